/* The arithmetic of `Int8` in `rounding.py`, which says what it means; bit for bit the same.
 *
 * A block's elements are read once and stay in the processor's registers and nearest cache, which
 * a chain of whole-vector operations cannot have. Whoever calls it holds the buffers; no function
 * keeps anything.
 *
 * Nothing here depends on how it is compiled: additions are not contracted with products, which are
 * exact, for the scales are powers of two, or infinite.
 */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

enum { BLOCK = 256, NOISE_PERIOD = 1 << 16, NOT_FINITE = 255, ONE_SQUARED = 254 };

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
/* glibc picks the widest that the processor has when the module is loaded */
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#ifdef __GNUC__
#define ALWAYS_INLINE __attribute__((always_inline))
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define ALWAYS_INLINE
#define PREFETCH(address) ((void)(address))
#endif

/* A processor foresees what is read next up to the end of a page, and not beyond. */
enum { PAGE_FLOATS = 1024, LINE_FLOATS = 16 };

#define MANTISSA_BITS 23
#define INFINITY_BITS 0x7F800000
#define UP_FROM_127_64THS (0x800000 - 0x7E0001)
#define NAN_BITS 0x7FC00000
/* added to a float of less than 2**22, it leaves the nearest whole number in the lowest bits; of
 * two as near, the even one */
#define ROUNDS 12582912.0f

static inline float float_of(int32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline int32_t bits_of(float value)
{
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float scale_of(int stored)
{
    return float_of(stored == NOT_FINITE ? NAN_BITS : stored << MANTISSA_BITS);
}

static inline Py_ssize_t blocks_of(Py_ssize_t elements)
{
    return (elements + BLOCK - 1) / BLOCK;
}

static inline int length_of_block(Py_ssize_t start, Py_ssize_t length)
{
    return length - start < BLOCK ? (int)(length - start) : BLOCK;
}

/* Fetches the block that is a page ahead of this one. */
static inline ALWAYS_INLINE void fetch_ahead(const float *values, Py_ssize_t start,
                                             Py_ssize_t length)
{
    if (start + PAGE_FLOATS + BLOCK <= length)
        for (int i = 0; i < BLOCK; i += LINE_FLOATS)
            PREFETCH(values + start + PAGE_FLOATS + i);
}

/* Returns the block's scale. */
static inline ALWAYS_INLINE uint8_t pack_block(const float *restrict values, int count,
                                               const float *restrict chances,
                                               int8_t *restrict multiples)
{
    int32_t peak = 0;
    for (int i = 0; i < count; i++) {
        const int32_t bits = bits_of(values[i]) & 0x7FFFFFFF;
        peak = bits > peak ? bits : peak;
    }
    if (peak >= INFINITY_BITS) {
        memset(multiples, 0, (size_t)count);
        return NOT_FINITE;
    }
    const int32_t stored = ((peak + UP_FROM_127_64THS) >> MANTISSA_BITS) - 6;
    const uint8_t scale = stored < 1 ? 1 : (uint8_t)stored;
    const float reciprocal = scale_of(ONE_SQUARED - scale);
    for (int i = 0; i < count; i++)
        multiples[i] = (int8_t)bits_of(chances[i] + values[i] * reciprocal + ROUNDS);
    return scale;
}

FOR_EACH_PROCESSOR
static void pack(const float *restrict values, Py_ssize_t length, const float *restrict chances,
                 Py_ssize_t noise, uint8_t *restrict out)
{
    int8_t *restrict multiples = (int8_t *)out + blocks_of(length);
    for (Py_ssize_t start = 0; start < length; start += BLOCK) {
        fetch_ahead(values, start, length);
        out[start / BLOCK] = pack_block(values + start, length_of_block(start, length),
                                        chances + (noise + start) % NOISE_PERIOD,
                                        multiples + start);
    }
}

FOR_EACH_PROCESSOR
static void pack_sum(const float *restrict values, Py_ssize_t length, const float *restrict chances,
                     Py_ssize_t noise, uint8_t *restrict out, const uint8_t *restrict payload)
{
    const Py_ssize_t blocks = blocks_of(length);
    float sums[BLOCK];
    for (Py_ssize_t start = 0; start < length; start += BLOCK) {
        const int count = length_of_block(start, length);
        const int8_t *added = (const int8_t *)payload + blocks + start;
        const float scale = scale_of(payload[start / BLOCK]);
        fetch_ahead(values, start, length);
        for (int i = 0; i < count; i++)
            sums[i] = values[start + i] + (float)added[i] * scale;
        out[start / BLOCK] = pack_block(sums, count, chances + (noise + start) % NOISE_PERIOD,
                                        (int8_t *)out + blocks + start);
    }
}

FOR_EACH_PROCESSOR
static void unpack(const uint8_t *restrict scales, float *restrict out, Py_ssize_t length)
{
    const int8_t *restrict multiples = (const int8_t *)scales + blocks_of(length);
    for (Py_ssize_t start = 0; start < length; start += BLOCK) {
        const float scale = scale_of(scales[start / BLOCK]);
        const int count = length_of_block(start, length);
        for (int i = 0; i < count; i++)
            out[start + i] = (float)multiples[start + i] * scale;
    }
}

FOR_EACH_PROCESSOR
static void add(const uint8_t *restrict scales, float *restrict to, Py_ssize_t length)
{
    const int8_t *restrict multiples = (const int8_t *)scales + blocks_of(length);
    for (Py_ssize_t start = 0; start < length; start += BLOCK) {
        const float scale = scale_of(scales[start / BLOCK]);
        const int count = length_of_block(start, length);
        if (scales[start / BLOCK] == NOT_FINITE) { /* which of two NaNs a sum is, is not defined */
            for (int i = 0; i < count; i++)
                to[start + i] = scale;
            continue;
        }
        for (int i = 0; i < count; i++)
            to[start + i] += (float)multiples[start + i] * scale;
    }
}

/* --- called by Python -------------------------------------------------------------------- */

enum { VALUES, CHANCES, PAYLOAD, SUMMAND, BUFFERS };

static void release(Py_buffer *buffers)
{
    for (int i = 0; i < BUFFERS; i++)
        if (buffers[i].obj)
            PyBuffer_Release(&buffers[i]);
}

static int is_aligned(const Py_buffer *floats)
{
    return (uintptr_t)floats->buf % sizeof(float) == 0;
}

/* Whether there is as much as the number of values says; sets an error otherwise. */
static int fit(const Py_buffer *buffers, Py_ssize_t *length)
{
    const Py_buffer *values = &buffers[VALUES], *chances = &buffers[CHANCES];
    *length = values->len / (Py_ssize_t)sizeof(float);
    if (values->len % (Py_ssize_t)sizeof(float) ||
        buffers[PAYLOAD].len != blocks_of(*length) + *length ||
        (buffers[SUMMAND].obj && buffers[SUMMAND].len != buffers[PAYLOAD].len) ||
        (chances->obj && chances->len < (Py_ssize_t)sizeof(float) * (NOISE_PERIOD + BLOCK))) {
        PyErr_SetString(PyExc_ValueError, "the vectors' lengths do not fit each other");
        return 0;
    }
    if (!is_aligned(values) || !is_aligned(chances)) {
        PyErr_SetString(PyExc_ValueError, "a vector begins in the middle of a float");
        return 0;
    }
    return 1;
}

static PyObject *call_pack(PyObject *module, PyObject *arguments)
{
    Py_buffer buffers[BUFFERS] = {0};
    Py_ssize_t noise, length;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*y*nw*|y*", &buffers[VALUES], &buffers[CHANCES], &noise,
                          &buffers[PAYLOAD], &buffers[SUMMAND]))
        return NULL;
    const float *values = buffers[VALUES].buf, *chances = buffers[CHANCES].buf;
    const uint8_t *summand = buffers[SUMMAND].buf;
    uint8_t *out = buffers[PAYLOAD].buf;
    int fits = fit(buffers, &length);
    if (fits && (noise < 0 || noise >= NOISE_PERIOD)) {
        PyErr_SetString(PyExc_ValueError, "the noise is not within its period");
        fits = 0;
    }
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        if (summand)
            pack_sum(values, length, chances, noise, out, summand);
        else
            pack(values, length, chances, noise, out);
        Py_END_ALLOW_THREADS
    }
    release(buffers);
    return fits ? Py_NewRef(Py_None) : NULL;
}

static PyObject *call_into(PyObject *arguments,
                           void (*into)(const uint8_t *, float *, Py_ssize_t))
{
    Py_buffer buffers[BUFFERS] = {0};
    Py_ssize_t length;
    if (!PyArg_ParseTuple(arguments, "y*w*", &buffers[PAYLOAD], &buffers[VALUES]))
        return NULL;
    const int fits = fit(buffers, &length);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        into(buffers[PAYLOAD].buf, buffers[VALUES].buf, length);
        Py_END_ALLOW_THREADS
    }
    release(buffers);
    return fits ? Py_NewRef(Py_None) : NULL;
}

static PyObject *call_unpack(PyObject *module, PyObject *arguments)
{
    (void)module;
    return call_into(arguments, unpack);
}

static PyObject *call_add(PyObject *module, PyObject *arguments)
{
    (void)module;
    return call_into(arguments, add);
}

static PyMethodDef functions[] = {
    {"pack", call_pack, METH_VARARGS, "pack(values, chances, noise, out[, summand])"},
    {"unpack", call_unpack, METH_VARARGS, "unpack(payload, out)"},
    {"add", call_add, METH_VARARGS, "add(payload, to)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_int8", "The arithmetic of int8.", -1, functions, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__int8(void)
{
    return PyModule_Create(&definition);
}
