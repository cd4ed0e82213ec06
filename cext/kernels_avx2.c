/* The conversion with AVX2, FMA and F16C: eight columns of two rows at a time on the way in, sixteen of one back. */
#include "kernels.h"

#if HR_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))

/* Vector j holds values 8j to 8j+7 of the 24 of eight columns. */
#define TABLE(value) {{HR_EIGHT(value, 0)}, {HR_EIGHT(value, 8)}, {HR_EIGHT(value, 16)}}
static const uint32_t luma_order[3][8] __attribute__((aligned(32))) = TABLE(HR_LUMA);
static const uint32_t chroma_order[3][8] __attribute__((aligned(32))) = TABLE(HR_CHROMA);
static const uint32_t nv12_u_order[3][8] __attribute__((aligned(32))) = TABLE(HR_NV12_U);
static const uint32_t nv12_v_order[3][8] __attribute__((aligned(32))) = TABLE(HR_NV12_V);

HR_INLINE TARGET __m256i order(const uint32_t *table) {
    return _mm256_load_si256((const __m256i *)table);
}

/* {red, green, blue} repeated, from value 8j on. */
HR_INLINE TARGET __m256 triplet(int j, float red, float green, float blue) {
    float v[12];
    for (int i = 0; i < 12; i += 3) v[i] = red, v[i + 1] = green, v[i + 2] = blue;
    return _mm256_loadu_ps(v + 8 * j % 3);
}

HR_INLINE TARGET __m256 clamp8(__m256 value) { /* max gives its second operand for NaN */
    return _mm256_min_ps(_mm256_max_ps(value, _mm256_setzero_ps()), _mm256_set1_ps(1.0f));
}

HR_INLINE TARGET __m256 floats(__m256i bytes, __m256i which) {
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, which));
}

HR_INLINE TARGET void store8(void *out, ptrdiff_t index, __m256 value, int half, int stream) {
    if (half) {
        __m128i *to = (__m128i *)((uint16_t *)out + index);
        __m128i halves = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
        if (stream)
            _mm_stream_si128(to, halves);
        else
            _mm_storeu_si128(to, halves);
    } else if (stream) {
        _mm256_stream_ps((float *)out + index, value);
    } else {
        _mm256_storeu_ps((float *)out + index, value);
    }
}

/* Every output vector is ys * Y + (cu * U + cv * V + c0) with Y, U and V shuffled to the output's order, so nothing
 * is interleaved afterwards, and NV12 differs in the shuffle alone. The bracket serves two rows. */
HR_INLINE TARGET void to_image_as(
    const hr_picture *p, const hr_image *image, int width, int height, const hr_to_rgb *k, int half, int nv12,
    int stream) {
    const int write_ahead = hr_write_ahead;
    const __m256 ys = _mm256_set1_ps(k->ys);
    __m256 cu[3], cv[3], c0[3];
    for (int j = 0; j < 3; ++j) {
        cu[j] = triplet(j, 0.0f, k->gu, k->bu);
        cv[j] = triplet(j, k->rv, k->gv, 0.0f);
        c0[j] = triplet(j, k->r0, k->g0, k->b0);
    }
    for (int row = 0; row < height; row += 2) {
        hr_rows_in rows = hr_rows_to_image(p, image, row, height);
        int x = 0;
        for (; x + 8 <= width; x += 8) {
            hr_prefetch_rows(&rows, x, nv12 ? 2 : 1);
            if (!stream) {
                hr_prefetch_image(rows.out0, x, 3, half, 8, write_ahead);
                hr_prefetch_image(rows.out1, x, 3, half, 8, write_ahead);
            }
            __m256i y0 = _mm256_set1_epi64x(hr_load64(rows.y0 + x)), y1 = _mm256_set1_epi64x(hr_load64(rows.y1 + x));
            __m256i u, v;
            if (nv12) {
                u = v = _mm256_set1_epi64x(hr_load64(rows.u + x));
            } else {
                u = _mm256_set1_epi32(hr_load32(rows.u + x / 2));
                v = _mm256_set1_epi32(hr_load32(rows.v + x / 2));
            }
#pragma GCC unroll 3
            for (int j = 0; j < 3; ++j) {
                __m256i u_order = order(nv12 ? nv12_u_order[j] : chroma_order[j]);
                __m256i v_order = order(nv12 ? nv12_v_order[j] : chroma_order[j]);
                __m256 chroma = _mm256_fmadd_ps(floats(u, u_order), cu[j], c0[j]);
                chroma = _mm256_fmadd_ps(floats(v, v_order), cv[j], chroma);
                __m256 rgb0 = _mm256_fmadd_ps(floats(y0, order(luma_order[j])), ys, chroma);
                __m256 rgb1 = _mm256_fmadd_ps(floats(y1, order(luma_order[j])), ys, chroma);
                store8(rows.out0, 3 * (ptrdiff_t)x + 8 * j, clamp8(rgb0), half, stream);
                store8(rows.out1, 3 * (ptrdiff_t)x + 8 * j, clamp8(rgb1), half, stream);
            }
        }
        hr_pair_to_image(&rows, x, width, p->step, half, k);
    }
    if (stream) _mm_sfence(); /* streaming stores are weakly ordered: another thread may read the image next */
}

TARGET static void to_image(
    const hr_picture *p, const hr_image *image, int width, int height, const hr_to_rgb *k, int stream) {
    int nv12 = p->step == 2;
    stream = stream && hr_streamable(image, height, image->half ? 16 : 32);
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

HR_INLINE TARGET __m256 load8(const void *in, ptrdiff_t index, int half) {
    if (half) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)in + index)));
    return _mm256_loadu_ps((const float *)in + index);
}

/* Eight pixels from column x as 24 clamped values in memory order; a fourth value of a pixel is dropped. */
HR_INLINE TARGET void load_packed(const void *in, ptrdiff_t x, int pixel, int half, __m256 packed[3]) {
    if (pixel == 3) {
        for (int j = 0; j < 3; ++j) packed[j] = clamp8(load8(in, 3 * x + 8 * j, half));
        return;
    }
    __m256 two[4];
    for (int j = 0; j < 4; ++j) two[j] = clamp8(load8(in, 4 * x + 8 * j, half));
    __m256i head = _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 0, 0);
    packed[0] = _mm256_blend_ps(
        _mm256_permutevar8x32_ps(two[0], head),
        _mm256_permutevar8x32_ps(two[1], _mm256_setr_epi32(0, 0, 0, 0, 0, 0, 0, 1)), 0xc0);
    packed[1] = _mm256_blend_ps(
        _mm256_permutevar8x32_ps(two[1], _mm256_setr_epi32(2, 4, 5, 6, 0, 0, 0, 0)),
        _mm256_permutevar8x32_ps(two[2], _mm256_setr_epi32(0, 0, 0, 0, 0, 1, 2, 4)), 0xf0);
    packed[2] = _mm256_blend_ps(
        _mm256_permutevar8x32_ps(two[2], _mm256_setr_epi32(5, 6, 0, 0, 0, 0, 0, 0)),
        _mm256_permutevar8x32_ps(two[3], _mm256_setr_epi32(0, 0, 0, 1, 2, 4, 5, 6)), 0xfc);
}

typedef struct {
    __m256 yr, yg, yb, y0, ur, ug, ub, vr, vg, vb;
} weights;

/* Eight columns of one row: luma as integers, and this row's share of four chroma samples as
 * u0 u1 v0 v1 | u2 u3 v2 v3, the sum of its two columns. */
HR_INLINE TARGET __m256i yuv8(const void *in, ptrdiff_t x, int pixel, int half, const weights *k, __m256 *chroma) {
    __m256 in3[3];
    load_packed(in, x, pixel, half, in3);
    /* Each of the three vectors holds every third value of a channel in other places: two blends collect them, one
     * permute sorts them. */
    __m256 red = _mm256_blend_ps(_mm256_blend_ps(in3[0], in3[1], 0x92), in3[2], 0x24);
    __m256 green = _mm256_blend_ps(_mm256_blend_ps(in3[0], in3[1], 0x24), in3[2], 0x49);
    __m256 blue = _mm256_blend_ps(_mm256_blend_ps(in3[0], in3[1], 0x49), in3[2], 0x92);
    red = _mm256_permutevar8x32_ps(red, _mm256_setr_epi32(0, 3, 6, 1, 4, 7, 2, 5));
    green = _mm256_permutevar8x32_ps(green, _mm256_setr_epi32(1, 4, 7, 2, 5, 0, 3, 6));
    blue = _mm256_permutevar8x32_ps(blue, _mm256_setr_epi32(2, 5, 0, 3, 6, 1, 4, 7));
    __m256 u = _mm256_fmadd_ps(k->ur, red, _mm256_fmadd_ps(k->ug, green, _mm256_mul_ps(k->ub, blue)));
    __m256 v = _mm256_fmadd_ps(k->vr, red, _mm256_fmadd_ps(k->vg, green, _mm256_mul_ps(k->vb, blue)));
    *chroma = _mm256_add_ps(_mm256_shuffle_ps(u, v, 0x88), _mm256_shuffle_ps(u, v, 0xdd));
    return _mm256_cvtps_epi32(
        _mm256_fmadd_ps(k->yr, red, _mm256_fmadd_ps(k->yg, green, _mm256_fmadd_ps(k->yb, blue, k->y0))));
}

/* Sixteen integers, in two vectors in order, as saturated bytes. */
HR_INLINE TARGET __m128i bytes16(__m256i low, __m256i high) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

HR_INLINE TARGET void store_chroma(uint8_t *u, uint8_t *v, __m256 low, __m256 high, int nv12) {
    const __m256 grey = _mm256_set1_ps(128.0f);
    __m256i words = _mm256_packs_epi32(
        _mm256_cvtps_epi32(_mm256_add_ps(low, grey)), _mm256_cvtps_epi32(_mm256_add_ps(high, grey)));
    __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    /* u0 u1 v0 v1 u4 u5 v4 v5 u2 u3 v2 v3 u6 u7 v6 v7 */
    if (nv12) {
        bytes = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15));
        _mm_storeu_si128((__m128i *)u, bytes);
    } else {
        bytes = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, 2, 3, 10, 11, 6, 7, 14, 15));
        _mm_storel_epi64((__m128i *)u, bytes);
        _mm_storel_epi64((__m128i *)v, _mm_unpackhi_epi64(bytes, bytes));
    }
}

/* The image is read as one sequential stream: the first row of a pair leaves its share of the chroma in a scratch
 * that fits the L1 cache, the second row adds its own. Columns beyond HR_TILE are a further stream. */
HR_INLINE TARGET void from_image_as(
    const hr_image *image, const hr_picture *p, int width, int height, const hr_to_yuv *c, int pixel, int half,
    int nv12) {
    const weights k = {
        _mm256_set1_ps(c->yr), _mm256_set1_ps(c->yg), _mm256_set1_ps(c->yb), _mm256_set1_ps(c->y0),
        _mm256_set1_ps(c->ur), _mm256_set1_ps(c->ug), _mm256_set1_ps(c->ub), _mm256_set1_ps(c->vr),
        _mm256_set1_ps(c->vg), _mm256_set1_ps(c->vb),
    };
    float scratch[HR_TILE] __attribute__((aligned(32)));
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
                    __m256 low, high;
                    __m256i y_low = yuv8(in, x, pixel, half, &k, &low);
                    __m256i y_high = yuv8(in, x + 8, pixel, half, &k, &high);
                    _mm_storeu_si128((__m128i *)(y + x), bytes16(y_low, y_high));
                    if (!second) {
                        _mm256_store_ps(share, low);
                        _mm256_store_ps(share + 8, high);
                    } else {
                        low = _mm256_add_ps(low, _mm256_load_ps(share));
                        high = _mm256_add_ps(high, _mm256_load_ps(share + 8));
                        store_chroma(rows.u + (nv12 ? x : x / 2), rows.v + x / 2, low, high, nv12);
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
    const __m256 scale = _mm256_set1_ps(1.0f / 255.0f);
    ptrdiff_t values = 3 * (ptrdiff_t)width;
    for (int row = 0; row < height; ++row) {
        const uint8_t *in = p->y + row * p->y_stride;
        void *out = (char *)image->data + row * image->stride;
        ptrdiff_t i = 0;
        for (; i + 8 <= values; i += 8) {
            __m256i levels = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(in + i)));
            store8(out, i, _mm256_mul_ps(_mm256_cvtepi32_ps(levels), scale), half, stream);
        }
        hr_values_to_image(in, out, i, values, half);
    }
    if (stream) _mm_sfence();
}

TARGET static void rgb24_to_image(const hr_picture *p, const hr_image *image, int width, int height, int stream) {
    stream = stream && hr_streamable(image, height, image->half ? 16 : 32);
    switch (image->half << 1 | stream) {
    case 0: rgb24_to_image_as(p, image, width, height, 0, 0); break;
    case 1: rgb24_to_image_as(p, image, width, height, 0, 1); break;
    case 2: rgb24_to_image_as(p, image, width, height, 1, 0); break;
    case 3: rgb24_to_image_as(p, image, width, height, 1, 1); break;
    }
}

HR_INLINE TARGET void image_to_rgb24_as(
    const hr_image *image, const hr_picture *p, int width, int height, int pixel, int half) {
    const __m256 scale = _mm256_set1_ps(255.0f);
    for (int row = 0; row < height; ++row) {
        const void *in = (const char *)image->data + row * image->stride;
        uint8_t *out = p->y + row * p->y_stride;
        int x = 0;
        for (; x + 8 <= width; x += 8) {
            hr_prefetch_image(in, x, pixel, half, 8, HR_READ_AHEAD);
            __m256 packed[3];
            __m256i levels[3];
            load_packed(in, x, pixel, half, packed);
            for (int j = 0; j < 3; ++j) levels[j] = _mm256_cvtps_epi32(_mm256_mul_ps(packed[j], scale));
            _mm_storeu_si128((__m128i *)(out + 3 * (ptrdiff_t)x), bytes16(levels[0], levels[1]));
            __m128i rest = bytes16(levels[2], levels[2]);
            _mm_storel_epi64((__m128i *)(out + 3 * (ptrdiff_t)x + 16), rest);
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

const hr_backend hr_avx2 = {"avx2", to_image, from_image, rgb24_to_image, image_to_rgb24};
#endif
