/* The conversion in plain C, and the choice of a back end. Baseline of x86-64 and the path of every other CPU. */
#include "kernels.h"

#include <math.h>
#include <string.h>

/* IEEE half of 0 <= value <= 1, rounded to nearest even. */
HR_INLINE uint16_t half_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (bits < 0x38800000u) { /* below 2^-14 a half is subnormal: let the adder round at 2^-24 */
        float shifted = value + 0.5f;
        memcpy(&bits, &shifted, sizeof bits);
        return (uint16_t)(bits - 0x3f000000u);
    }
    bits += 0xfffu + ((bits >> 13) & 1u);
    return (uint16_t)((bits >> 13) - (112u << 10));
}

/* Any half, infinities and NaN included. */
HR_INLINE float float_of(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fffu) << 13;
    float value;
    if ((half & 0x7c00u) == 0x7c00u) {
        bits |= 0x7f800000u;
        memcpy(&value, &bits, sizeof value);
    } else { /* the exponent's bias differs by 112; the product is exact, for subnormal halves too */
        memcpy(&value, &bits, sizeof value);
        value *= 0x1p112f;
    }
    return half & 0x8000u ? -value : value;
}

/* A comparison with NaN is false, so NaN becomes 0. */
HR_INLINE float clamp(float value) {
    value = value > 0.0f ? value : 0.0f;
    return value < 1.0f ? value : 1.0f;
}

HR_INLINE float load(const void *data, ptrdiff_t index, int half) {
    return clamp(half ? float_of(((const uint16_t *)data)[index]) : ((const float *)data)[index]);
}

HR_INLINE void store(void *data, ptrdiff_t index, float value, int half) {
    if (half)
        ((uint16_t *)data)[index] = half_of(clamp(value));
    else
        ((float *)data)[index] = clamp(value);
}

HR_INLINE uint8_t level(float value) {
    long rounded = lrintf(value);
    return (uint8_t)(rounded > 255 ? 255 : rounded < 0 ? 0 : rounded);
}

HR_INLINE void pair_to_image(const hr_rows_in *rows, int x, int width, int step, int half, const hr_to_rgb *k) {
    for (; x < width; x += 2) {
        float u = rows->u[(x >> 1) * step], v = rows->v[(x >> 1) * step];
        float red = k->rv * v + k->r0, green = k->gu * u + k->gv * v + k->g0, blue = k->bu * u + k->b0;
        for (int column = x; column < x + 2 && column < width; ++column) {
            float luma0 = k->ys * rows->y0[column], luma1 = k->ys * rows->y1[column];
            ptrdiff_t at = 3 * (ptrdiff_t)column;
            store(rows->out0, at, luma0 + red, half);
            store(rows->out0, at + 1, luma0 + green, half);
            store(rows->out0, at + 2, luma0 + blue, half);
            store(rows->out1, at, luma1 + red, half);
            store(rows->out1, at + 1, luma1 + green, half);
            store(rows->out1, at + 2, luma1 + blue, half);
        }
    }
}

HR_INLINE void pair_from_image(
    const hr_rows_out *rows, int x, int width, int step, int pixel, int half, const hr_to_yuv *k) {
    for (; x < width; x += 2) {
        float sum[3] = {0.0f, 0.0f, 0.0f};
        for (int dx = 0; dx < 2; ++dx) {
            int column = x + dx < width ? x + dx : x;
            for (int dy = 0; dy < 2; ++dy) {
                const void *in = dy ? rows->in1 : rows->in0;
                ptrdiff_t at = (ptrdiff_t)column * pixel;
                float red = load(in, at, half), green = load(in, at + 1, half), blue = load(in, at + 2, half);
                (dy ? rows->y1 : rows->y0)[column] = level(k->yr * red + k->yg * green + k->yb * blue + k->y0);
                sum[0] += red;
                sum[1] += green;
                sum[2] += blue;
            }
        }
        rows->u[(x >> 1) * step] = level(k->ur * sum[0] + k->ug * sum[1] + k->ub * sum[2] + 128.0f);
        rows->v[(x >> 1) * step] = level(k->vr * sum[0] + k->vg * sum[1] + k->vb * sum[2] + 128.0f);
    }
}

/* The variants are constants to the inlined body; the branch between them stays outside the loop. */
void hr_pair_to_image(const hr_rows_in *rows, int x, int width, int step, int half, const hr_to_rgb *k) {
    if (half)
        pair_to_image(rows, x, width, step, 1, k);
    else
        pair_to_image(rows, x, width, step, 0, k);
}

void hr_pair_from_image(
    const hr_rows_out *rows, int x, int width, int step, int pixel, int half, const hr_to_yuv *k) {
    if (half)
        pair_from_image(rows, x, width, step, pixel, 1, k);
    else
        pair_from_image(rows, x, width, step, pixel, 0, k);
}

static void to_image(
    const hr_picture *picture, const hr_image *image, int width, int height, const hr_to_rgb *k, int stream) {
    (void)stream;
    for (int row = 0; row < height; row += 2) {
        hr_rows_in rows = hr_rows_to_image(picture, image, row, height);
        hr_pair_to_image(&rows, 0, width, picture->step, image->half, k);
    }
}

static void from_image(
    const hr_image *image, const hr_picture *picture, int width, int height, const hr_to_yuv *k) {
    for (int row = 0; row < height; row += 2) {
        hr_rows_out rows = hr_rows_from_image(image, picture, row, height);
        hr_pair_from_image(&rows, 0, width, picture->step, image->pixel, image->half, k);
    }
}

void hr_values_to_image(const uint8_t *in, void *out, ptrdiff_t i, ptrdiff_t count, int half) {
    if (half)
        for (; i < count; ++i) ((uint16_t *)out)[i] = half_of(in[i] * (1.0f / 255.0f));
    else
        for (; i < count; ++i) ((float *)out)[i] = in[i] * (1.0f / 255.0f);
}

void hr_row_to_rgb24(const void *in, uint8_t *out, int x, int width, int pixel, int half) {
    for (; x < width; ++x)
        for (int c = 0; c < 3; ++c)
            out[3 * (ptrdiff_t)x + c] = level(255.0f * load(in, (ptrdiff_t)x * pixel + c, half));
}

static void rgb24_to_image(const hr_picture *picture, const hr_image *image, int width, int height, int stream) {
    (void)stream;
    for (int row = 0; row < height; ++row)
        hr_values_to_image(
            picture->y + row * picture->y_stride, (char *)image->data + row * image->stride, 0, 3 * (ptrdiff_t)width,
            image->half);
}

static void image_to_rgb24(const hr_image *image, const hr_picture *picture, int width, int height) {
    for (int row = 0; row < height; ++row)
        hr_row_to_rgb24(
            (const char *)image->data + row * image->stride, picture->y + row * picture->y_stride, 0, width,
            image->pixel, image->half);
}

const hr_backend hr_c = {"c", to_image, from_image, rgb24_to_image, image_to_rgb24};

const hr_backend *hr_find(const char *name) {
    if (strcmp(name, "c") == 0) return &hr_c;
#if HR_X86
    /* The compiler's run-time asks the operating system too, whether it saves these registers. */
    if (strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        return &hr_avx2;
    if (strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return &hr_avx512;
#endif
    return NULL;
}

int hr_write_ahead = HR_WRITE_AHEAD;

size_t hr_tune(void) {
#if HR_X86
    __builtin_cpu_init();
    if (__builtin_cpu_is("intel") && __builtin_cpu_supports("avx512f")) {
        hr_write_ahead = 512;
        return SIZE_MAX;
    }
#endif
    return HR_STREAM_BYTES;
}
