/* Conversion between 8-bit planes and interleaved RGB floats: one fused pass, no allocation, no threads, no checks.
 *
 * The caller guarantees sizes, strides and alignment to the element (cext/__init__.py). Every back end has the same
 * table of functions; kernels.c picks one at import by what the CPU can do. */
#ifndef HEADRACE_KERNELS_H
#define HEADRACE_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HR_X86 1
#else
#define HR_X86 0
#endif

#define HR_INLINE static inline __attribute__((always_inline))

/* What one call writes from which on streaming stores pay. The kernel alone, cold buffers, ratio to the limit at
 * 512x512 (3 MiB): streaming 1.07 (AVX2) and 1.05 (AVX-512), normal stores 1.43 and 1.36, of which 1.13 is the limit
 * of normal stores themselves. With what follows counted in (conversion, a node or none, conversion back; pool of two
 * images, a codec at work on the other core, a frame each 10 ms) streaming costs the same or less at 512x512: 0.35
 * against 0.36 ms without a node, 0.56 against 0.55 with one (AVX-512), 0.36 against 0.40 and 0.58 against 0.58
 * (AVX2). Only frames back to back with nothing beside them find a warm pool, and then lose 0.03 to 0.08 ms of 0.11 to
 * 0.27; with pages of 2 MiB they lose twice that, and the engine asks for normal stores (engine/graph/
 * image_memory.py). Below 2 MiB an image fits beside its successor into the second-level cache of newer CPUs. */
#define HR_STREAM_BYTES ((size_t)2 << 20)

/* Columns that the way back takes at a time: the scratch for their chroma is 16 KiB, half of a small L1 cache. */
#define HR_TILE 4096

/* How far ahead of the loops their memory is asked for, in bytes: of a plane, of an image that is read, of one that is
 * written through the cache (hr_tune may choose otherwise). A picture is four or five interleaved streams, which the hardware's own prefetch follows
 * badly. Cold buffers, ratio to the limit without it and with 2 KiB: forward at 720p AVX2 1.33 and 1.05, AVX-512 1.17
 * and 1.05; with normal stores 1.75 and 1.4, 1.4 and 1.3 at 512x512 (with 8 KiB 1.5); one row at a time with the chroma
 * in a scratch is no better than pairs of rows. An image that is read, AVX-512 at 1080p: 1.40 with 2 KiB, 1.10 with 8.
 * In the trip, where a codec on the other core wants the memory too, 1080p forward and back in ms a frame: 0.66 and
 * 0.79 with 2 KiB for all, 0.62 and 0.71 with 4, 0.61 and 0.65 with 4 and 8, 0.66 and 0.64 with 4 and 16. */
#define HR_AHEAD 4096
#define HR_READ_AHEAD 8192
#define HR_WRITE_AHEAD 2048

/* Planes of one picture. I420: three planes, step 1. NV12: v = u + 1, step 2, equal strides. rgb24: y alone. */
typedef struct {
    uint8_t *y, *u, *v;
    ptrdiff_t y_stride, u_stride, v_stride; /* bytes from row to row */
    int step;                               /* bytes from one chroma sample to the next; 0 for rgb24 */
} hr_picture;

/* RGB 0..1 of one picture, float32 or IEEE half. */
typedef struct {
    void *data;
    ptrdiff_t stride; /* bytes from row to row */
    int pixel;        /* values from pixel to pixel: 3, or 4 with a value that is ignored */
    int half;
} hr_image;

/* Folded coefficients; formulas in cext/_colour.py. */
typedef struct {
    float ys, rv, r0, gu, gv, g0, bu, b0;
} hr_to_rgb;
typedef struct {
    float yr, yg, yb, y0, ur, ug, ub, vr, vg, vb;
} hr_to_yuv;

typedef struct {
    const char *name;
    /* stream: the call as a whole writes at least HR_STREAM_BYTES; the kernel still checks alignment. */
    void (*to_image)(const hr_picture *, const hr_image *, int width, int height, const hr_to_rgb *, int stream);
    void (*from_image)(const hr_image *, const hr_picture *, int width, int height, const hr_to_yuv *);
    void (*rgb24_to_image)(const hr_picture *, const hr_image *, int width, int height, int stream);
    void (*image_to_rgb24)(const hr_image *, const hr_picture *, int width, int height);
} hr_backend;

extern const hr_backend hr_c;
#if HR_X86
extern const hr_backend hr_avx2;
extern const hr_backend hr_avx512;
#endif

/* The back end of that name if this CPU can run it, else NULL. */
const hr_backend *hr_find(const char *name);

/* Sets hr_write_ahead for this CPU and gives the bytes of a call from which on streaming stores pay on it. Once, before
 * the first conversion.
 *
 * On Intel's servers (those with AVX-512) they never pay: a core has ten to sixteen buffers for lines on their way, and
 * a streaming store holds one until memory itself has the line. Cascade Lake, cold buffers, ratio to the limit, which
 * is that of normal stores there (1.55 ms at 720p, streaming 1.89), at 512x512, 720p and 1080p: streaming 1.42, 1.57
 * and 1.60 with AVX2, 1.08, 1.23 and 1.25 with AVX-512; normal with lines asked for 2 KiB ahead 0.93, 0.92 and 0.93,
 * and 1.18, 1.01 and 1.05; with 512 bytes 1.01, 0.93 and 0.94, and 0.95, 0.91 and 0.95. */
size_t hr_tune(void);
extern int hr_write_ahead;

/* One pair of rows in plain C from column x (even) on: the whole of hr_c, and the end of a row for the others.
 * A picture's odd last row comes as a pair of itself with itself. */
typedef struct {
    const uint8_t *y0, *y1, *u, *v;
    void *out0, *out1;
} hr_rows_in;
typedef struct {
    const void *in0, *in1;
    uint8_t *y0, *y1, *u, *v;
} hr_rows_out;
void hr_pair_to_image(const hr_rows_in *rows, int x, int width, int step, int half, const hr_to_rgb *k);
void hr_pair_from_image(const hr_rows_out *rows, int x, int width, int step, int pixel, int half, const hr_to_yuv *k);
/* The same for packed pictures: values i to count of a row, and columns x to width of a row. */
void hr_values_to_image(const uint8_t *in, void *out, ptrdiff_t i, ptrdiff_t count, int half);
void hr_row_to_rgb24(const void *in, uint8_t *out, int x, int width, int pixel, int half);

/* Memory limits, for the bench only (limits.c): the bytes that a float32 conversion of n pixels reads and writes. */
enum { HR_LIMIT_STORE, HR_LIMIT_STREAM, HR_LIMIT_AHEAD };
void hr_limit_forward(const uint8_t *source, float *destination, size_t pixels, int way);
void hr_limit_back(const float *source, uint8_t *destination, size_t pixels, int ahead);

HR_INLINE int64_t hr_load64(const uint8_t *bytes) {
    int64_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

HR_INLINE int32_t hr_load32(const uint8_t *bytes) {
    int32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

/* Ask for `columns` pixels of an image that lie so many bytes after column x. Past the end it does nothing. */
HR_INLINE void hr_prefetch_image(const void *image, ptrdiff_t x, int pixel, int half, int columns, int bytes) {
    const int size = pixel * (half ? 2 : 4);
    const char *ahead = (const char *)image + x * size + bytes;
    for (int byte = 0; byte < columns * size; byte += 64) __builtin_prefetch(ahead + byte);
}

/* The same for the rows of a picture; step 1 is I420, 2 is NV12. */
HR_INLINE void hr_prefetch_rows(const hr_rows_in *rows, ptrdiff_t x, int step) {
    __builtin_prefetch(rows->y0 + x + HR_AHEAD);
    __builtin_prefetch(rows->y1 + x + HR_AHEAD);
    __builtin_prefetch(rows->u + (x + HR_AHEAD) / 2 * step);
    if (step == 1) __builtin_prefetch(rows->v + (x + HR_AHEAD) / 2);
}

/* Whether streaming stores, which fault on a misaligned address, can write every row in pieces of `size` bytes. */
HR_INLINE int hr_streamable(const hr_image *image, int height, size_t size) {
    return ((uintptr_t)image->data | (height > 1 ? (uintptr_t)image->stride : 0)) % size == 0;
}

/* Byte shuffles that take luma or chroma bytes straight to 32-bit integers in the order of interleaved RGB: value i
 * belongs to column i / 3, and two columns share a chroma sample. 0x80 clears the upper three bytes. */
#define HR_LUMA(i) (0x80808000u | ((i) / 3))
#define HR_CHROMA(i) (0x80808000u | ((i) / 6))
#define HR_NV12_U(i) (0x80808000u | ((i) / 6 * 2))
#define HR_NV12_V(i) (0x80808000u | ((i) / 6 * 2 + 1))
#define HR_EIGHT(value, i) \
    value(i), value((i) + 1), value((i) + 2), value((i) + 3), value((i) + 4), value((i) + 5), value((i) + 6), \
        value((i) + 7)

HR_INLINE hr_rows_in hr_rows_to_image(const hr_picture *p, const hr_image *image, int row, int height) {
    int next = row + 1 < height ? row + 1 : row;
    hr_rows_in rows = {
        p->y + row * p->y_stride,
        p->y + next * p->y_stride,
        p->u + row / 2 * p->u_stride,
        p->v + row / 2 * p->v_stride,
        (char *)image->data + row * image->stride,
        (char *)image->data + next * image->stride,
    };
    return rows;
}

HR_INLINE hr_rows_out hr_rows_from_image(const hr_image *image, const hr_picture *p, int row, int height) {
    int next = row + 1 < height ? row + 1 : row;
    hr_rows_out rows = {
        (const char *)image->data + row * image->stride,
        (const char *)image->data + next * image->stride,
        p->y + row * p->y_stride,
        p->y + next * p->y_stride,
        p->u + row / 2 * p->u_stride,
        p->v + row / 2 * p->v_stride,
    };
    return rows;
}

#endif
