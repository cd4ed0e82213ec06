/* The conversion with AVX-512 (F, BW, VL): kernels_avx2.c with sixteen lanes. Explanations are there. */
#include "kernels.h"

#if HR_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma,f16c")))

/* Vector j holds values 16j to 16j+15 of the 48 of sixteen columns. */
#define SIXTEEN(value, i) {HR_EIGHT(value, i), HR_EIGHT(value, (i) + 8)}
#define TABLE(value) {SIXTEEN(value, 0), SIXTEEN(value, 16), SIXTEEN(value, 32)}
static const uint32_t luma_order[3][16] __attribute__((aligned(64))) = TABLE(HR_LUMA);
static const uint32_t chroma_order[3][16] __attribute__((aligned(64))) = TABLE(HR_CHROMA);
static const uint32_t nv12_u_order[3][16] __attribute__((aligned(64))) = TABLE(HR_NV12_U);
static const uint32_t nv12_v_order[3][16] __attribute__((aligned(64))) = TABLE(HR_NV12_V);

HR_INLINE TARGET __m512i order(const uint32_t *table) {
    return _mm512_load_si512(table);
}

HR_INLINE TARGET __m512 triplet(int j, float red, float green, float blue) {
    float v[18];
    for (int i = 0; i < 18; i += 3) v[i] = red, v[i + 1] = green, v[i + 2] = blue;
    return _mm512_loadu_ps(v + 16 * j % 3);
}

HR_INLINE TARGET __m512 clamp16(__m512 value) {
    return _mm512_min_ps(_mm512_max_ps(value, _mm512_setzero_ps()), _mm512_set1_ps(1.0f));
}

HR_INLINE TARGET __m512 floats(__m512i bytes, __m512i which) {
    return _mm512_cvtepi32_ps(_mm512_shuffle_epi8(bytes, which));
}

HR_INLINE TARGET __m512i sixteen(const uint8_t *bytes) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)bytes));
}

HR_INLINE TARGET void store16(void *out, ptrdiff_t index, __m512 value, int half, int stream) {
    if (half) {
        __m256i *to = (__m256i *)((uint16_t *)out + index);
        __m256i halves = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        if (stream)
            _mm256_stream_si256(to, halves);
        else
            _mm256_storeu_si256(to, halves);
    } else if (stream) {
        _mm512_stream_ps((float *)out + index, value);
    } else {
        _mm512_storeu_ps((float *)out + index, value);
    }
}

HR_INLINE TARGET void to_image_as(
    const hr_picture *p, const hr_image *image, int width, int height, const hr_to_rgb *k, int half, int nv12,
    int stream) {
    const int write_ahead = hr_write_ahead;
    const __m512 ys = _mm512_set1_ps(k->ys);
    __m512 cu[3], cv[3], c0[3];
    for (int j = 0; j < 3; ++j) {
        cu[j] = triplet(j, 0.0f, k->gu, k->bu);
        cv[j] = triplet(j, k->rv, k->gv, 0.0f);
        c0[j] = triplet(j, k->r0, k->g0, k->b0);
    }
    for (int row = 0; row < height; row += 2) {
        hr_rows_in rows = hr_rows_to_image(p, image, row, height);
        int x = 0;
        for (; x + 16 <= width; x += 16) {
            hr_prefetch_rows(&rows, x, nv12 ? 2 : 1);
            if (!stream) {
                hr_prefetch_image(rows.out0, x, 3, half, 16, write_ahead);
                hr_prefetch_image(rows.out1, x, 3, half, 16, write_ahead);
            }
            __m512i y0 = sixteen(rows.y0 + x), y1 = sixteen(rows.y1 + x);
            __m512i u, v;
            if (nv12) {
                u = v = sixteen(rows.u + x);
            } else {
                u = _mm512_set1_epi64(hr_load64(rows.u + x / 2));
                v = _mm512_set1_epi64(hr_load64(rows.v + x / 2));
            }
#pragma GCC unroll 3
            for (int j = 0; j < 3; ++j) {
                __m512i u_order = order(nv12 ? nv12_u_order[j] : chroma_order[j]);
                __m512i v_order = order(nv12 ? nv12_v_order[j] : chroma_order[j]);
                __m512 chroma = _mm512_fmadd_ps(floats(u, u_order), cu[j], c0[j]);
                chroma = _mm512_fmadd_ps(floats(v, v_order), cv[j], chroma);
                __m512 rgb0 = _mm512_fmadd_ps(floats(y0, order(luma_order[j])), ys, chroma);
                __m512 rgb1 = _mm512_fmadd_ps(floats(y1, order(luma_order[j])), ys, chroma);
                store16(rows.out0, 3 * (ptrdiff_t)x + 16 * j, clamp16(rgb0), half, stream);
                store16(rows.out1, 3 * (ptrdiff_t)x + 16 * j, clamp16(rgb1), half, stream);
            }
        }
        hr_pair_to_image(&rows, x, width, p->step, half, k);
    }
    if (stream) _mm_sfence();
}

TARGET static void to_image(
    const hr_picture *p, const hr_image *image, int width, int height, const hr_to_rgb *k, int stream) {
    int nv12 = p->step == 2;
    stream = stream && hr_streamable(image, height, image->half ? 32 : 64);
    switch (image->half << 2 | nv12 << 1 | stream) {
    case 0: to_image_as(p, image, width, height, k, 0, 0, 0); break;
    case 1: to_image_as(p, image, width, height, k, 0, 0, 1); break;
    case 2: to_image_as(p, image, width, height, k, 0, 1, 0); break;
    case 3: to_image_as(p, image, width, height, k, 0, 1, 1); break;
    case 4: to_image_as(p, image, width, height, k, 1, 0, 0); break;
    case 5: to_image_as(p, image, width, height, k, 1, 0, 1); break;
    case 6: to_image_as(p, image, width, height, k, 1, 1, 0); break;
    case 7: to_image_as(p, image, width, height, k, 1, 1, 1); break;
    }
}

HR_INLINE TARGET __m512 load16(const void *in, ptrdiff_t index, int half) {
    if (half) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)in + index)));
    return _mm512_loadu_ps((const float *)in + index);
}

/* Sixteen pixels from column x as 48 clamped values in memory order; a fourth value of a pixel is dropped. */
HR_INLINE TARGET void load_packed(const void *in, ptrdiff_t x, int pixel, int half, __m512 packed[3]) {
    if (pixel == 3) {
        for (int j = 0; j < 3; ++j) packed[j] = clamp16(load16(in, 3 * x + 16 * j, half));
        return;
    }
    __m512 four[4];
    for (int j = 0; j < 4; ++j) four[j] = clamp16(load16(in, 4 * x + 16 * j, half));
    /* Indices from 16 on are lanes of the second vector. */
    packed[0] = _mm512_permutex2var_ps(
        four[0], _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18, 20), four[1]);
    packed[1] = _mm512_permutex2var_ps(
        four[1], _mm512_setr_epi32(5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18, 20, 21, 22, 24, 25), four[2]);
    packed[2] = _mm512_permutex2var_ps(
        four[2], _mm512_setr_epi32(10, 12, 13, 14, 16, 17, 18, 20, 21, 22, 24, 25, 26, 28, 29, 30), four[3]);
}

typedef struct {
    __m512 yr, yg, yb, y0, ur, ug, ub, vr, vg, vb;
} weights;

/* Sixteen columns of one row: luma as bytes, and this row's share of eight chroma samples, in each quarter
 * u u v v. */
HR_INLINE TARGET __m128i yuv16(const void *in, ptrdiff_t x, int pixel, int half, const weights *k, __m512 *chroma) {
    __m512 in3[3];
    load_packed(in, x, pixel, half, in3);
    __m512 red = _mm512_mask_blend_ps(0x2492, _mm512_mask_blend_ps(0x4924, in3[0], in3[1]), in3[2]);
    __m512 green = _mm512_mask_blend_ps(0x4924, _mm512_mask_blend_ps(0x9249, in3[0], in3[1]), in3[2]);
    __m512 blue = _mm512_mask_blend_ps(0x9249, _mm512_mask_blend_ps(0x2492, in3[0], in3[1]), in3[2]);
    red = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 3, 6, 9, 12, 15, 2, 5, 8, 11, 14, 1, 4, 7, 10, 13), red);
    green = _mm512_permutexvar_ps(_mm512_setr_epi32(1, 4, 7, 10, 13, 0, 3, 6, 9, 12, 15, 2, 5, 8, 11, 14), green);
    blue = _mm512_permutexvar_ps(_mm512_setr_epi32(2, 5, 8, 11, 14, 1, 4, 7, 10, 13, 0, 3, 6, 9, 12, 15), blue);
    __m512 u = _mm512_fmadd_ps(k->ur, red, _mm512_fmadd_ps(k->ug, green, _mm512_mul_ps(k->ub, blue)));
    __m512 v = _mm512_fmadd_ps(k->vr, red, _mm512_fmadd_ps(k->vg, green, _mm512_mul_ps(k->vb, blue)));
    *chroma = _mm512_add_ps(_mm512_shuffle_ps(u, v, 0x88), _mm512_shuffle_ps(u, v, 0xdd));
    return _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(
        _mm512_fmadd_ps(k->yr, red, _mm512_fmadd_ps(k->yg, green, _mm512_fmadd_ps(k->yb, blue, k->y0)))));
}

HR_INLINE TARGET void store_chroma(uint8_t *u, uint8_t *v, __m512 sum, int nv12) {
    __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(_mm512_add_ps(sum, _mm512_set1_ps(128.0f))));
    if (nv12) {
        bytes = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
        _mm_storeu_si128((__m128i *)u, bytes);
    } else {
        bytes = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
        _mm_storel_epi64((__m128i *)u, bytes);
        _mm_storel_epi64((__m128i *)v, _mm_unpackhi_epi64(bytes, bytes));
    }
}

HR_INLINE TARGET void from_image_as(
    const hr_image *image, const hr_picture *p, int width, int height, const hr_to_yuv *c, int pixel, int half,
    int nv12) {
    const weights k = {
        _mm512_set1_ps(c->yr), _mm512_set1_ps(c->yg), _mm512_set1_ps(c->yb), _mm512_set1_ps(c->y0),
        _mm512_set1_ps(c->ur), _mm512_set1_ps(c->ug), _mm512_set1_ps(c->ub), _mm512_set1_ps(c->vr),
        _mm512_set1_ps(c->vg), _mm512_set1_ps(c->vb),
    };
    float scratch[HR_TILE] __attribute__((aligned(64)));
    const int vectors = width & ~15;
    for (int start = 0; start < vectors; start += HR_TILE) {
        int end = vectors < start + HR_TILE ? vectors : start + HR_TILE;
        for (int row = 0; row < height; row += 2) {
            hr_rows_out rows = hr_rows_from_image(image, p, row, height);
            for (int second = 0; second < 2; ++second) {
                const void *in = second ? rows.in1 : rows.in0;
                uint8_t *y = second ? rows.y1 : rows.y0;
                float *share = scratch;
                for (int x = start; x < end; x += 16, share += 16) {
                    hr_prefetch_image(in, x, pixel, half, 16, HR_READ_AHEAD);
                    __m512 sum;
                    _mm_storeu_si128((__m128i *)(y + x), yuv16(in, x, pixel, half, &k, &sum));
                    if (!second) {
                        _mm512_store_ps(share, sum);
                    } else {
                        sum = _mm512_add_ps(sum, _mm512_load_ps(share));
                        store_chroma(rows.u + (nv12 ? x : x / 2), rows.v + x / 2, sum, nv12);
                    }
                }
            }
        }
    }
    for (int row = 0; row < height && vectors < width; row += 2) {
        hr_rows_out rows = hr_rows_from_image(image, p, row, height);
        hr_pair_from_image(&rows, vectors, width, p->step, pixel, half, c);
    }
}

TARGET static void from_image(
    const hr_image *image, const hr_picture *p, int width, int height, const hr_to_yuv *c) {
    int nv12 = p->step == 2, alpha = image->pixel == 4;
    switch (image->half << 2 | nv12 << 1 | alpha) {
    case 0: from_image_as(image, p, width, height, c, 3, 0, 0); break;
    case 1: from_image_as(image, p, width, height, c, 4, 0, 0); break;
    case 2: from_image_as(image, p, width, height, c, 3, 0, 1); break;
    case 3: from_image_as(image, p, width, height, c, 4, 0, 1); break;
    case 4: from_image_as(image, p, width, height, c, 3, 1, 0); break;
    case 5: from_image_as(image, p, width, height, c, 4, 1, 0); break;
    case 6: from_image_as(image, p, width, height, c, 3, 1, 1); break;
    case 7: from_image_as(image, p, width, height, c, 4, 1, 1); break;
    }
}

HR_INLINE TARGET void rgb24_to_image_as(
    const hr_picture *p, const hr_image *image, int width, int height, int half, int stream) {
    const __m512 scale = _mm512_set1_ps(1.0f / 255.0f);
    ptrdiff_t values = 3 * (ptrdiff_t)width;
    for (int row = 0; row < height; ++row) {
        const uint8_t *in = p->y + row * p->y_stride;
        void *out = (char *)image->data + row * image->stride;
        ptrdiff_t i = 0;
        for (; i + 16 <= values; i += 16) {
            __m512i levels = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(in + i)));
            store16(out, i, _mm512_mul_ps(_mm512_cvtepi32_ps(levels), scale), half, stream);
        }
        hr_values_to_image(in, out, i, values, half);
    }
    if (stream) _mm_sfence();
}

TARGET static void rgb24_to_image(const hr_picture *p, const hr_image *image, int width, int height, int stream) {
    stream = stream && hr_streamable(image, height, image->half ? 32 : 64);
    switch (image->half << 1 | stream) {
    case 0: rgb24_to_image_as(p, image, width, height, 0, 0); break;
    case 1: rgb24_to_image_as(p, image, width, height, 0, 1); break;
    case 2: rgb24_to_image_as(p, image, width, height, 1, 0); break;
    case 3: rgb24_to_image_as(p, image, width, height, 1, 1); break;
    }
}

HR_INLINE TARGET void image_to_rgb24_as(
    const hr_image *image, const hr_picture *p, int width, int height, int pixel, int half) {
    const __m512 scale = _mm512_set1_ps(255.0f);
    for (int row = 0; row < height; ++row) {
        const void *in = (const char *)image->data + row * image->stride;
        uint8_t *out = p->y + row * p->y_stride;
        int x = 0;
        for (; x + 16 <= width; x += 16) {
            hr_prefetch_image(in, x, pixel, half, 16, HR_READ_AHEAD);
            __m512 packed[3];
            load_packed(in, x, pixel, half, packed);
            for (int j = 0; j < 3; ++j) {
                __m512i levels = _mm512_cvtps_epi32(_mm512_mul_ps(packed[j], scale));
                _mm_storeu_si128((__m128i *)(out + 3 * (ptrdiff_t)x + 16 * j), _mm512_cvtusepi32_epi8(levels));
            }
        }
        hr_row_to_rgb24(in, out, x, width, pixel, half);
    }
}

TARGET static void image_to_rgb24(const hr_image *image, const hr_picture *p, int width, int height) {
    switch (image->half << 1 | (image->pixel == 4)) {
    case 0: image_to_rgb24_as(image, p, width, height, 3, 0); break;
    case 1: image_to_rgb24_as(image, p, width, height, 4, 0); break;
    case 2: image_to_rgb24_as(image, p, width, height, 3, 1); break;
    case 3: image_to_rgb24_as(image, p, width, height, 4, 1); break;
    }
}

const hr_backend hr_avx512 = {"avx512", to_image, from_image, rgb24_to_image, image_to_rgb24};
#endif
