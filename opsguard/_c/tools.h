/* Small tools that the modules in C have in common. Each has its own copy: they share no symbols. */

#ifndef OPSGUARD_TOOLS_H
#define OPSGUARD_TOOLS_H

#include <Python.h>
#include <time.h>

/* Code that is run a few times for a request is in no cache the first time and in all of them the
 * next: one copy that all call beats one in each of them.
 */
#if defined(__GNUC__)
#define ONE_COPY __attribute__((noinline)) static
#else
#define ONE_COPY static
#endif

/* The exception that is set, taken off; NULL if none is. */
static inline PyObject *
take_error(void)
{
#if PY_VERSION_HEX >= 0x030C0000
    return PyErr_GetRaisedException();
#else
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    if (type == NULL)
        return NULL;
    PyErr_NormalizeException(&type, &error, &trace);
    if (trace != NULL)
        PyException_SetTraceback(error, trace);
    Py_DECREF(type);
    Py_XDECREF(trace);
    return error;
#endif
}

/* Replace what a field holds. */
static inline void
put(PyObject **field, PyObject *value)
{
    PyObject *old = *field;
    *field = Py_NewRef(value);
    Py_XDECREF(old);
}

static inline int
is_set(PyObject *field)
{
    return field != NULL && field != Py_None;
}

/* As time.perf_counter, whose clock and rounding these are. */
static inline double
now(void)
{
#ifdef __APPLE__
    return (double)clock_gettime_nsec_np(CLOCK_UPTIME_RAW) / 1e9;
#else
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)((long long)at.tv_sec * 1000000000LL + at.tv_nsec) / 1e9;
#endif
}

#endif
