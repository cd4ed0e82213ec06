/* What memory alone costs: the measure of the bench. The same bytes as a conversion, read and written by the widest
 * common loop, with no more arithmetic than keeps the loads alive. Not used by the product.
 *
 * pixels: a multiple of 512; both buffers aligned to 64 bytes. */
#include "kernels.h"

#if HR_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2")))

/* 128 bytes in, 1024 out: 1.5 and 12 bytes a pixel. */
HR_INLINE TARGET void forward(const uint8_t *source, float *destination, size_t pixels, int way) {
    for (size_t step = 0; step < pixels * 12 / 1024; ++step) {
        const __m256i *in = (const __m256i *)(source + 128 * step);
        const int write_ahead = hr_write_ahead;
        __m256i *out = (__m256i *)(destination + 256 * step);
        for (int vector = 0; vector < 32; ++vector) {
            __m256i value = _mm256_load_si256(in + vector / 8);
            if (way == HR_LIMIT_AHEAD && vector % 2 == 0)
                __builtin_prefetch((const char *)(out + vector) + write_ahead);
            if (way == HR_LIMIT_STREAM)
                _mm256_stream_si256(out + vector, value);
            else
                _mm256_store_si256(out + vector, value);
        }
    }
    if (way == HR_LIMIT_STREAM) _mm_sfence();
}

TARGET static void forward_avx2(const uint8_t *source, float *destination, size_t pixels, int way) {
    switch (way) {
    case HR_LIMIT_STREAM: forward(source, destination, pixels, HR_LIMIT_STREAM); break;
    case HR_LIMIT_AHEAD: forward(source, destination, pixels, HR_LIMIT_AHEAD); break;
    default: forward(source, destination, pixels, HR_LIMIT_STORE);
    }
}

TARGET static void back_avx2(const float *source, uint8_t *destination, size_t pixels, int ahead) {
    for (size_t step = 0; step < pixels * 12 / 1024; ++step) {
        const __m256i *in = (const __m256i *)(source + 256 * step);
        __m256i *out = (__m256i *)(destination + 128 * step);
        for (int group = 0; group < 4; ++group) {
            __m256i value = _mm256_setzero_si256();
            for (int vector = 0; vector < 8; ++vector) {
                if (ahead && vector % 2 == 0) __builtin_prefetch((const char *)(in + 8 * group + vector) + HR_AHEAD);
                value = _mm256_or_si256(value, _mm256_load_si256(in + 8 * group + vector));
            }
            _mm256_store_si256(out + group, value);
        }
    }
}
#endif

void hr_limit_forward(const uint8_t *source, float *destination, size_t pixels, int way) {
#if HR_X86
    if (__builtin_cpu_supports("avx2")) {
        forward_avx2(source, destination, pixels, way);
        return;
    }
#endif
    (void)way;
    for (size_t step = 0; step < pixels * 12 / 1024; ++step)
        for (size_t copy = 0; copy < 8; ++copy)
            memcpy(destination + 256 * step + 32 * copy, source + 128 * step, 128);
}

void hr_limit_back(const float *source, uint8_t *destination, size_t pixels, int ahead) {
#if HR_X86
    if (__builtin_cpu_supports("avx2")) {
        back_avx2(source, destination, pixels, ahead);
        return;
    }
#endif
    (void)ahead;
    for (size_t step = 0; step < pixels * 12 / 1024; ++step)
        for (size_t word = 0; word < 32; ++word) {
            uint32_t value = 0, next;
            for (size_t copy = 0; copy < 8; ++copy) {
                memcpy(&next, source + 256 * step + 32 * copy + word, sizeof next);
                value |= next;
            }
            memcpy(destination + 128 * step + 4 * word, &value, sizeof value);
        }
}
