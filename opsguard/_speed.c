/* The request path once more, in C: an optional twin of the core and of the adapters' edges and hooks.
 * The parts lie in `_c`, each says of what it is the twin. They are compiled as one, in this order:
 * each knows those before it.
 *
 * The Python code is the reference. What is here does the same for the usual request and hands the
 * unusual one to the Python function that it was given: a header the app sets itself, a failure, an
 * answer of ours. It is used under the GIL only, and in the main interpreter only, so a function
 * that calls no Python code is one step to all other threads.
 *
 * References: a local holds what it borrowed from a structure only as long as nothing is called.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <math.h>
#include <pthread.h>
#include <sys/stat.h>
#include <time.h>

#include "_c/tools.h"

#ifdef Py_GIL_DISABLED
#error "the accelerator relies on the GIL"
#endif

static PyObject *zero, *nothing; /* 0 and () */
static struct {
    PyObject *type, *http, *method, *path, *root_path, *client, *headers, *status, *body, *more_body;
    PyObject *start, *body_kind, *pathsend, *throw, *close, *fastapi, *http_version;
    PyObject *site_close, *site_enter, *site_open, *site_endpoint, *site_head;
    PyObject *authorization, *empty;
    PyObject *request_method, *path_info, *script_name, *remote_addr, *file_wrapper, *head, *fail;
    PyObject *taken_over;
    PyObject *meta, *routed, *input, *container, *store, *closers, *status_code, *lower, *match, *route;
    PyObject *added, *identity, *request, *url_rule, *rule, *rule_endpoint;
} names;

static PyTypeObject ExchangeType, SeriesType, RecorderType, CoreType, DoorType, EdgeType, RespondType,
    WatchType, HookType, GateType, StartType, BodyType, CloserType;

#include "_c/objects.h"
#include "_c/exchange.h"
#include "_c/metrics.h"
#include "_c/core.h"
#include "_c/door.h"
#include "_c/asgi.h"
#include "_c/wsgi.h"
#include "_c/django.h"
#include "_c/flask.h"
#include "_c/starlette.h"
#include "_c/lines.h"
#include "_c/text.h"

/* Module --------------------------------------------------------------------------------------- */

static PyObject *
speed_fresh(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(nothing))
{
    return fresh();
}

static PyObject *
speed_now(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(nothing))
{
    return PyFloat_FromDouble(now());
}

static PyMethodDef speed_functions[] = {
    {"now", speed_now, METH_NOARGS, "The clock that is read here; it must be clock.elapsed."},
    {"fresh", speed_fresh, METH_NOARGS, "As ids.fresh."},
    {"take_lines", (PyCFunction)(void (*)(void))speed_take_lines, METH_FASTCALL,
     "The usual lines of AccessLog.drain."},
    {"lines_of", speed_lines_of, METH_VARARGS, "As metrics.text._lines."},
    {"straight", front_straight, METH_O, "As calls.straight."},
    {NULL},
};

static int
set_up(void)
{
    static const struct { PyObject **at; const char *text; } texts[] = {
        {&names.type, "type"}, {&names.http, "http"}, {&names.method, "method"}, {&names.path, "path"},
        {&names.root_path, "root_path"}, {&names.client, "client"}, {&names.headers, "headers"},
        {&names.status, "status"}, {&names.body, "body"}, {&names.more_body, "more_body"},
        {&names.start, "http.response.start"}, {&names.body_kind, "http.response.body"},
        {&names.pathsend, "http.response.pathsend"},
        {&names.throw, "throw"}, {&names.close, "close"}, {&names.fastapi, "fastapi"},
        {&names.http_version, "http_version"},
        {&names.site_close, "close"}, {&names.site_enter, "enter"},
        {&names.site_open, "open"}, {&names.site_endpoint, "endpoint"}, {&names.site_head, "head"},
        {&names.authorization, "authorization"}, {&names.empty, ""},
        {&names.request_method, "REQUEST_METHOD"}, {&names.path_info, "PATH_INFO"},
        {&names.script_name, "SCRIPT_NAME"}, {&names.remote_addr, "REMOTE_ADDR"},
        {&names.file_wrapper, "wsgi.file_wrapper"}, {&names.head, "HEAD"}, {&names.fail, "fail"},
        {&names.taken_over, "taken_over"},
        {&names.meta, "META"}, {&names.routed, "path_info"}, {&names.input, "wsgi.input"},
        {&names.container, "_container"}, {&names.store, "_store"},
        {&names.closers, "_resource_closers"}, {&names.status_code, "status_code"},
        {&names.added, "_opsguard_headers"}, {&names.lower, "lower"},
        {&names.match, "resolver_match"}, {&names.route, "route"},
        {&names.identity, "opsguard_identity"}, {&names.request, "werkzeug.request"},
        {&names.url_rule, "url_rule"}, {&names.rule, "rule"}, {&names.rule_endpoint, "endpoint"},
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if ((*texts[i].at = PyUnicode_InternFromString(texts[i].text)) == NULL)
            return -1;
    zero = PyLong_FromLong(0);
    nothing = PyTuple_New(0);
    if (nothing == NULL)
        return -1;
    PyObject *os = zero == NULL ? NULL : PyImport_ImportModule("os");
    if (os == NULL)
        return -1;
    urandom = PyObject_GetAttrString(os, "urandom");
    Py_DECREF(os);
    if (urandom == NULL)
        return -1;
    if (pthread_atfork(NULL, NULL, forget_pool) != 0) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

/* Runs for each interpreter that imports this, and each time: what is static is set up once. */
static int
speed_exec(PyObject *module)
{
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_ImportError, "the accelerator works in the main interpreter only");
        return -1;
    }
    if (urandom == NULL && set_up() < 0)
        return -1;
    static const struct { const char *name; PyTypeObject *type; } types[] = {
        {"Fields", &ExchangeType}, {"RouteSeries", &SeriesType}, {"Recorder", &RecorderType},
        {"Core", &CoreType},       {"Door", &DoorType},          {"Edge", &EdgeType},
        {"Hook", &HookType},       {"Respond", &RespondType},    {"Watch", &WatchType},
        {"Shelf", &ShelfType},     {"Hinge", &HingeType},        {"Gate", &GateType},
        {"Front", &FrontType},
        {"Start", &StartType},     {"Body", &BodyType},          {"Closer", &CloserType},
        {"Middle", &MiddleType},   {"Entry", &EntryType},
        {"Turn", &TurnType},       {"Queue", &QueueType},
    };
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (PyType_Ready(types[i].type) < 0
            || PyModule_AddObjectRef(module, types[i].name, (PyObject *)types[i].type) < 0)
            return -1;
#ifndef TRAINED
#define TRAINED 0
#endif
    if (PyModule_AddObjectRef(module, "trained", TRAINED ? Py_True : Py_False) < 0)
        return -1;
    /* As the class in Python has it, which is where `copy` and `pickle` learn of such attributes. */
    PyObject *slots = Py_BuildValue("(s)", "_serve");
    int failed = slots == NULL ? -1 : PyDict_SetItemString(FrontType.tp_dict, "__slots__", slots);
    Py_XDECREF(slots);
    return failed;
}

static PyModuleDef_Slot speed_slots[] = {
    {Py_mod_exec, speed_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef speed_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "opsguard._speed",
    .m_doc = "The request path in C; see `opsguard.accelerator`.",
    .m_methods = speed_functions,
    .m_slots = speed_slots,
};

PyMODINIT_FUNC
PyInit__speed(void)
{
    return PyModuleDef_Init(&speed_module);
}
