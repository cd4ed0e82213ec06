"""Hands arrays to the C kernels with the GIL released. The door in ``__init__`` has checked every argument."""

from cpython.buffer cimport PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc


cdef extern from "kernels.h" nogil:
    ctypedef struct hr_picture:
        uint8_t *y
        uint8_t *u
        uint8_t *v
        ptrdiff_t y_stride
        ptrdiff_t u_stride
        ptrdiff_t v_stride
        int step

    ctypedef struct hr_image:
        void *data
        ptrdiff_t stride
        int pixel
        int half

    ctypedef struct hr_to_rgb:
        float ys, rv, r0, gu, gv, g0, bu, b0

    ctypedef struct hr_to_yuv:
        float yr, yg, yb, y0, ur, ug, ub, vr, vg, vb

    ctypedef struct hr_backend:
        const char *name
        void (*to_image)(const hr_picture *, const hr_image *, int, int, const hr_to_rgb *, int) noexcept nogil
        void (*from_image)(const hr_image *, const hr_picture *, int, int, const hr_to_yuv *) noexcept nogil
        void (*rgb24_to_image)(const hr_picture *, const hr_image *, int, int, int) noexcept nogil
        void (*image_to_rgb24)(const hr_image *, const hr_picture *, int, int) noexcept nogil

    const size_t HR_STREAM_BYTES
    const hr_backend hr_c
    const hr_backend *hr_find(const char *name)
    void hr_limit_forward(const uint8_t *source, float *destination, size_t pixels, int stream)
    void hr_limit_back(const float *source, uint8_t *destination, size_t pixels, int ahead)


# Rows that the way back takes at a time, an even number: 0.7 MB of 1280 columns.
cdef enum:
    BAND = 48

cdef const hr_backend *chosen = &hr_c
cdef size_t stream_bytes = HR_STREAM_BYTES


def supports(str name):
    """Whether this build has the back end ``name`` and this CPU can run it."""
    return hr_find(name.encode()) != NULL


def select(str name):
    """Use the back end ``name`` from now on. Raises ValueError if this CPU cannot run it."""
    global chosen
    cdef const hr_backend *found = hr_find(name.encode())
    if found == NULL:
        raise ValueError(f"the CPU cannot run {name}")
    chosen = found


def stream_from(size_t nbytes):
    """For tests and the bench: calls that write at least ``nbytes`` use streaming stores. Returns the last value."""
    global stream_bytes
    cdef size_t before = stream_bytes
    stream_bytes = nbytes
    return before


cdef struct Memory:
    char *data
    ptrdiff_t[4] shape
    ptrdiff_t[4] strides
    ptrdiff_t itemsize


cdef int look(object array, bint writable, Memory *memory) except -1:
    """Where an array lies. The pointer stays valid while the caller holds the array: NumPy does not move data."""
    cdef Py_buffer view
    cdef int axis
    PyObject_GetBuffer(array, &view, PyBUF_STRIDES | (PyBUF_WRITABLE if writable else 0))
    memory.data = <char *>view.buf
    memory.itemsize = view.itemsize
    for axis in range(view.ndim):
        memory.shape[axis] = view.shape[axis]
        memory.strides[axis] = view.strides[axis]
    PyBuffer_Release(&view)
    return 0


cdef hr_picture picture_of(object arrays, bint writable) except *:
    """One array: rgb24; two: nv12; three: i420."""
    cdef hr_picture picture
    cdef Memory memory
    cdef int count = len(arrays)
    look(arrays[0], writable, &memory)
    picture.y = picture.u = picture.v = <uint8_t *>memory.data
    picture.y_stride = picture.u_stride = picture.v_stride = memory.strides[0]
    picture.step = 0
    if count > 1:
        look(arrays[1], writable, &memory)
        picture.u = <uint8_t *>memory.data
        picture.v = picture.u + 1
        picture.u_stride = picture.v_stride = memory.strides[0]
        picture.step = 2
    if count > 2:
        look(arrays[2], writable, &memory)
        picture.v = <uint8_t *>memory.data
        picture.v_stride = memory.strides[0]
        picture.step = 1
    return picture


cdef class Batch:
    """Pictures and images of one call as the kernels want them."""

    cdef hr_picture *pictures
    cdef hr_image image
    cdef ptrdiff_t image_step, count
    cdef int width, height

    def __cinit__(self, pictures, images, bint write_pictures):
        cdef Memory memory
        cdef ptrdiff_t index
        look(images, not write_pictures, &memory)
        self.count, self.height, self.width = memory.shape[0], memory.shape[1], memory.shape[2]
        self.image_step = memory.strides[0]
        self.image.data = memory.data
        self.image.stride = memory.strides[1]
        # The stride of an axis of length 1 says nothing.
        self.image.pixel = memory.strides[2] // memory.itemsize if self.width > 1 else 3
        self.image.half = memory.itemsize == 2
        self.pictures = <hr_picture *>malloc(max(1, self.count) * sizeof(hr_picture))
        if self.pictures == NULL:
            raise MemoryError
        for index in range(self.count):
            self.pictures[index] = picture_of(pictures[index], write_pictures)

    def __dealloc__(self):
        free(self.pictures)


cdef void move(hr_picture *picture, hr_image *image, int rows) noexcept nogil:
    """Both begin ``rows``, an even number, further down."""
    cdef ptrdiff_t chroma_rows = rows // 2 if picture.step else rows
    picture.y += rows * picture.y_stride
    picture.u += chroma_rows * picture.u_stride
    picture.v += chroma_rows * picture.v_stride
    image.data = <char *>image.data + rows * image.stride


cdef void rows_to_image(
    const hr_backend *backend, const hr_picture *picture, const hr_image *image, int width, int rows,
    const hr_to_rgb *k, bint stream) noexcept nogil:
    if rows and picture.step == 0:
        backend.rgb24_to_image(picture, image, width, rows, stream)
    elif rows:
        backend.to_image(picture, image, width, rows, k, stream)


def to_images(pictures, images, colour, size_t cached=0):
    """Write each picture's RGB 0..1 into ``images`` (B, H, W, 3), float32 or float16.

    cached: of a call that writes so much that streaming stores pay, the last so many bytes go through the cache.
    """
    cdef Batch batch = Batch(pictures, images, False)
    cdef hr_to_rgb k
    cdef const hr_backend *backend = chosen
    cdef hr_picture picture
    cdef hr_image image
    cdef ptrdiff_t index
    cdef int rows, height = batch.height, width = batch.width
    cdef size_t row_bytes = <size_t>width * 3 * (2 if batch.image.half else 4)
    cdef size_t written = batch.count * height * row_bytes
    cdef size_t streamed = 0
    if written >= stream_bytes and written > cached:
        streamed = written - cached
    k.ys, k.rv, k.r0, k.gu, k.gv, k.g0, k.bu, k.b0 = colour.to_rgb
    with nogil:
        for index in range(batch.count):
            picture, image = batch.pictures[index], batch.image
            image.data = <char *>image.data + index * batch.image_step
            # A pair of rows shares its chroma.
            rows = <int>min(<size_t>height, (streamed + row_bytes - 1) // row_bytes + 1 & ~<size_t>1)
            streamed -= min(streamed, height * row_bytes)
            rows_to_image(backend, &picture, &image, width, rows, &k, True)
            move(&picture, &image, rows)
            rows_to_image(backend, &picture, &image, width, height - rows, &k, False)


def from_images(images, pictures, colour):
    """Write ``images`` (B, H, W, 3 or 4) into the pictures' planes, from the last rows to the first: who wrote them
    did it the other way round, and what is left of them in the cache is their end."""
    cdef Batch batch = Batch(pictures, images, True)
    cdef hr_to_yuv k
    cdef const hr_backend *backend = chosen
    cdef hr_picture picture
    cdef hr_image image
    cdef ptrdiff_t index
    cdef int row, rows, height = batch.height, width = batch.width
    k.yr, k.yg, k.yb, k.y0, k.ur, k.ug, k.ub, k.vr, k.vg, k.vb = colour.to_yuv
    with nogil:
        for index in range(batch.count - 1, -1, -1):
            row = (height - 1) // BAND * BAND
            while row >= 0:
                picture, image = batch.pictures[index], batch.image
                image.data = <char *>image.data + index * batch.image_step
                move(&picture, &image, row)
                rows = min(BAND, height - row)
                if picture.step == 0:
                    backend.image_to_rgb24(&image, &picture, width, rows)
                else:
                    backend.from_image(&image, &picture, width, rows, &k)
                row -= BAND


def limit_forward(source, destination, bint stream):
    """For the bench: reads 1.5 and writes 12 bytes a pixel, 64-byte aligned arrays, no arithmetic."""
    cdef Memory read, written
    look(source, False, &read)
    look(destination, True, &written)
    cdef size_t pixels = written.shape[0] // 3
    with nogil:
        hr_limit_forward(<const uint8_t *>read.data, <float *>written.data, pixels, stream)


def limit_back(source, destination, bint ahead):
    """For the bench: reads 12 and writes 1.5 bytes a pixel, with or without asking ahead."""
    cdef Memory read, written
    look(source, False, &read)
    look(destination, True, &written)
    cdef size_t pixels = read.shape[0] // 3
    with nogil:
        hr_limit_back(<const float *>read.data, <uint8_t *>written.data, pixels, ahead)
