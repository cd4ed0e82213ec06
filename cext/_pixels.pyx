"""Hands arrays to the C kernels with the GIL released. The door in ``__init__`` has checked every argument."""

from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_SIMPLE,
    PyBUF_STRIDES,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
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

    const hr_backend hr_c
    const hr_backend *hr_find(const char *name)
    size_t hr_tune()
    int HR_LIMIT_STORE, HR_LIMIT_STREAM, HR_LIMIT_AHEAD
    void hr_limit_forward(const uint8_t *source, float *destination, size_t pixels, int way)
    void hr_limit_back(const float *source, uint8_t *destination, size_t pixels, int ahead)


# Rows that the way back takes at a time, an even number: 0.7 MB of 1280 columns.
cdef enum:
    BAND = 48
    MOST = 1 << 15  # columns and rows of the plain case: no product of two overflows

cdef const hr_backend *chosen = &hr_c
cdef size_t stream_bytes = hr_tune()


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


cdef void batch_to_images(
    const hr_picture *pictures, hr_image image, ptrdiff_t image_step, ptrdiff_t count, int width, int height,
    const hr_to_rgb *k, size_t cached) noexcept nogil:
    cdef hr_picture picture
    cdef hr_image part
    cdef ptrdiff_t index
    cdef int rows
    cdef size_t row_bytes = <size_t>width * 3 * (2 if image.half else 4)
    cdef size_t written = count * height * row_bytes
    cdef size_t streamed = 0
    if written >= stream_bytes and written > cached:
        streamed = written - cached
    for index in range(count):
        picture, part = pictures[index], image
        # A pair of rows shares its chroma.
        rows = <int>min(<size_t>height, (streamed + row_bytes - 1) // row_bytes + 1 & ~<size_t>1)
        streamed -= min(streamed, height * row_bytes)
        rows_to_image(chosen, &picture, &part, width, rows, k, True)
        move(&picture, &part, rows)
        rows_to_image(chosen, &picture, &part, width, height - rows, k, False)
        image.data = <char *>image.data + image_step


cdef void image_to_picture(
    const hr_image *image, const hr_picture *picture, int width, int height, const hr_to_yuv *k) noexcept nogil:
    """From the last rows to the first: who wrote the image did it the other way round, and what is left of it in the
    cache is its end."""
    cdef hr_picture to
    cdef hr_image part
    cdef int rows, row = (height - 1) // BAND * BAND
    while row >= 0:
        to, part = picture[0], image[0]
        move(&to, &part, row)
        rows = min(BAND, height - row)
        if to.step == 0:
            chosen.image_to_rgb24(&part, &to, width, rows)
        else:
            chosen.from_image(&part, &to, width, rows, k)
        row -= BAND


cdef hr_to_rgb to_rgb_of(colour):
    cdef hr_to_rgb k
    k.ys, k.rv, k.r0, k.gu, k.gv, k.g0, k.bu, k.b0 = colour.to_rgb
    return k


cdef hr_to_yuv to_yuv_of(colour):
    cdef hr_to_yuv k
    k.yr, k.yg, k.yb, k.y0, k.ur, k.ug, k.ub, k.vr, k.vg, k.vb = colour.to_yuv
    return k


def to_images(pictures, images, colour, size_t cached=0):
    """Write each picture's RGB 0..1 into ``images`` (B, H, W, 3), float32 or float16.

    cached: of a call that writes so much that streaming stores pay, the last so many bytes go through the cache.
    """
    cdef Batch batch = Batch(pictures, images, False)
    cdef hr_to_rgb k = to_rgb_of(colour)
    with nogil:
        batch_to_images(
            batch.pictures, batch.image, batch.image_step, batch.count, batch.width, batch.height, &k, cached)


def from_images(images, pictures, colour):
    """Write ``images`` (B, H, W, 3 or 4) into the pictures' planes."""
    cdef Batch batch = Batch(pictures, images, True)
    cdef hr_to_yuv k = to_yuv_of(colour)
    cdef hr_image image
    cdef ptrdiff_t index
    with nogil:
        for index in range(batch.count - 1, -1, -1):
            image = batch.image
            image.data = <char *>image.data + index * batch.image_step
            image_to_picture(&image, &batch.pictures[index], batch.width, batch.height, &k)


# ---- the plain case: I420 without padding and float32, one picture, everything checked here
#
# Whoever else has the memory may be at work while the GIL is released: a bytearray that grows moves, a map that is
# closed is gone. As long as the buffer is held, either is refused.

cdef bint plain_picture(
    object buffer, bint writable, Py_ssize_t width, Py_ssize_t height, Py_buffer *view, hr_picture *picture):
    """Whether ``buffer`` is exactly one I420 picture of that size. ``view`` is the caller's to release then."""
    cdef size_t luma, chroma
    if width < 1 or height < 1 or width > MOST or height > MOST:
        return False
    luma = <size_t>width * height
    chroma = <size_t>((width + 1) // 2) * ((height + 1) // 2)
    try:
        PyObject_GetBuffer(buffer, view, PyBUF_SIMPLE | (PyBUF_WRITABLE if writable else 0))
    except (TypeError, ValueError, BufferError):
        return False
    if <size_t>view.len != luma + 2 * chroma:
        PyBuffer_Release(view)
        return False
    picture.y = <uint8_t *>view.buf
    picture.u = picture.y + luma
    picture.v = picture.u + chroma
    picture.y_stride = width
    picture.u_stride = picture.v_stride = (width + 1) // 2
    picture.step = 1
    return True


cdef bint plain_image(object array, bint writable, int ndim, Py_buffer *view, hr_image *image):
    """Whether ``array`` is one image of whole RGB pixels in float32, with ``ndim`` axes; its rows may have gaps. As
    above."""
    try:
        PyObject_GetBuffer(array, view, PyBUF_STRIDES | PyBUF_FORMAT | (PyBUF_WRITABLE if writable else 0))
    except (TypeError, ValueError, BufferError):
        return False
    cdef bint fits = (
        view.ndim == ndim and view.itemsize == 4 and view.format != NULL and view.format[0] == b"f"
        and view.format[1] == 0 and <size_t>view.buf % 4 == 0)
    if fits and ndim == 4:
        fits = view.shape[0] == 1
    if fits:
        fits = (
            0 < view.shape[ndim - 3] <= MOST and 0 < view.shape[ndim - 2] <= MOST and view.shape[ndim - 1] == 3
            and view.strides[ndim - 1] == 4 and view.strides[ndim - 2] == 12 and view.strides[ndim - 3] % 4 == 0
            and view.strides[ndim - 3] >= 12 * view.shape[ndim - 2])
    if not fits:
        PyBuffer_Release(view)
        return False
    image.data, image.stride, image.pixel, image.half = view.buf, view.strides[ndim - 3], 3, 0
    return True


cdef bint apart(const hr_picture *picture, const Py_buffer *bytes_view, const hr_image *image, int height):
    cdef size_t one = <size_t>picture.y, other = <size_t>image.data
    return one + <size_t>bytes_view.len <= other or other + height * <size_t>image.stride <= one


def plain_to_image(buffer, Py_ssize_t width, Py_ssize_t height, images, colour, size_t cached):
    """``buffer``, one I420 picture without padding, to ``images`` (1, H, W, 3) float32. False, and nothing was done,
    where anything is otherwise."""
    cdef Py_buffer read, written
    cdef hr_picture picture
    cdef hr_image image
    cdef hr_to_rgb k = to_rgb_of(colour)
    if not plain_picture(buffer, False, width, height, &read, &picture):
        return False
    try:
        if not plain_image(images, True, 4, &written, &image):
            return False
        try:
            if written.shape[1] != height or written.shape[2] != width:
                return False
            if not apart(&picture, &read, &image, <int>height):
                return False
            with nogil:
                batch_to_images(&picture, image, 0, 1, <int>width, <int>height, &k, cached)
            return True
        finally:
            PyBuffer_Release(&written)
    finally:
        PyBuffer_Release(&read)


def plain_from_image(image, buffer, colour):
    """``image`` (H, W, 3) float32 to ``buffer``, one I420 picture without padding; as above."""
    cdef Py_buffer read, written
    cdef hr_picture picture
    cdef hr_image source
    cdef int width, height
    cdef hr_to_yuv k = to_yuv_of(colour)
    if not plain_image(image, False, 3, &read, &source):
        return False
    try:
        height, width = <int>read.shape[0], <int>read.shape[1]
        if not plain_picture(buffer, True, width, height, &written, &picture):
            return False
        try:
            if not apart(&picture, &written, &source, height):
                return False
            with nogil:
                image_to_picture(&source, &picture, width, height, &k)
            return True
        finally:
            PyBuffer_Release(&written)
    finally:
        PyBuffer_Release(&read)


def limit_forward(source, destination, str way):
    """For the bench: reads 1.5 and writes 12 bytes a pixel, 64-byte aligned arrays, no arithmetic. ``way``: "store",
    "stream", or "ahead", which stores where it has asked for the line before."""
    cdef int number = {"store": HR_LIMIT_STORE, "stream": HR_LIMIT_STREAM, "ahead": HR_LIMIT_AHEAD}[way]
    cdef Memory read, written
    look(source, False, &read)
    look(destination, True, &written)
    cdef size_t pixels = written.shape[0] // 3
    with nogil:
        hr_limit_forward(<const uint8_t *>read.data, <float *>written.data, pixels, number)


def limit_back(source, destination, bint ahead):
    """For the bench: reads 12 and writes 1.5 bytes a pixel, with or without asking ahead."""
    cdef Memory read, written
    look(source, False, &read)
    look(destination, True, &written)
    cdef size_t pixels = read.shape[0] // 3
    with nogil:
        hr_limit_back(<const float *>read.data, <uint8_t *>written.data, pixels, ahead)
