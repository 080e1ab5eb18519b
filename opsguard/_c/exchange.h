/* Ids, and the exchange: what is known of one request, as `ids` and `exchange`. And how a class in
 * Python gets at the fields and calls of one in C without a look-up by name: Shelf, Hinge and Front.
 */

/* Ids ------------------------------------------------------------------------------------------ */

enum { ID_BYTES = 16, POOL = 128 };
static char pool[POOL][2 * ID_BYTES]; /* made together: one at a time is twelve lines of code more */
static int pooled; /* ids left in the pool */
static PyObject *urandom;

static void
forget_pool(void)
{
    pooled = 0; /* a forked child must not repeat the parent's ids */
}

/* 0 or -1. */
static int
fill_pool(void)
{
    static const char digits[] = "0123456789abcdef";
    PyObject *bytes = PyObject_CallFunction(urandom, "i", POOL * ID_BYTES);
    if (bytes == NULL)
        return -1;
    if (!PyBytes_Check(bytes) || PyBytes_GET_SIZE(bytes) != POOL * ID_BYTES) {
        Py_DECREF(bytes);
        PyErr_SetString(PyExc_OSError, "os.urandom gave too little");
        return -1;
    }
    const unsigned char *in = (const unsigned char *)PyBytes_AS_STRING(bytes);
    char *out = pool[0];
    for (int i = 0; i < POOL * ID_BYTES; i++) {
        *out++ = digits[in[i] >> 4];
        *out++ = digits[in[i] & 15];
    }
    pooled = POOL;
    Py_DECREF(bytes);
    return 0;
}

static PyObject *
fresh(void)
{
    if (pooled == 0 && fill_pool() < 0)
        return NULL;
    PyObject *text = PyUnicode_New(sizeof pool[0], 127); /* runs no other code: the id is ours */
    if (text != NULL)
        memcpy(PyUnicode_1BYTE_DATA(text), pool[--pooled], sizeof pool[0]);
    return text;
}

/* Exchange ------------------------------------------------------------------------------------- */

typedef struct Core Core;

typedef struct {
    PyObject_HEAD
    PyObject *client, *correlation_id, *method, *path, *plan, *request_id, *routed, *source, *status;
    PyObject *charged;
    PyObject *endpoint, *error, *fields, *reply, *series, *work; /* from here on NULL stands for None */
    PyObject *credentials, *extra, *held, *identity, *marked, *outer;
    Core *core; /* of a request that was opened here; a websocket has none. The last of the objects */
    double started, first_byte, ended;
    long long received, sent;
    Py_ssize_t place; /* see Recorder */
    char closed, correlated, left, uploads;
} Exchange;

#define OBJECT(name) {#name, T_OBJECT_EX, offsetof(Exchange, name), 0, NULL}
#define OPTIONAL(name) {#name, T_OBJECT, offsetof(Exchange, name), 0, NULL}
static PyMemberDef exchange_members[] = {
    OBJECT(client), OBJECT(correlation_id), OBJECT(method), OBJECT(path), OBJECT(plan),
    OBJECT(request_id), OBJECT(routed), OBJECT(source), OBJECT(status), OBJECT(charged),
    OPTIONAL(endpoint), OPTIONAL(error), OPTIONAL(fields), OPTIONAL(reply), OPTIONAL(series),
    OPTIONAL(work), OPTIONAL(credentials), OPTIONAL(extra), OPTIONAL(held), OPTIONAL(identity),
    OPTIONAL(marked), OPTIONAL(outer),
    {"started", T_DOUBLE, offsetof(Exchange, started), 0, NULL},
    {"first_byte", T_DOUBLE, offsetof(Exchange, first_byte), 0, NULL},
    {"ended", T_DOUBLE, offsetof(Exchange, ended), 0, NULL},
    {"place", T_PYSSIZET, offsetof(Exchange, place), 0, NULL},
    {"received", T_LONGLONG, offsetof(Exchange, received), 0, NULL},
    {"sent", T_LONGLONG, offsetof(Exchange, sent), 0, NULL},
    {"closed", T_BOOL, offsetof(Exchange, closed), 0, NULL},
    {"correlated", T_BOOL, offsetof(Exchange, correlated), 0, NULL},
    {"left", T_BOOL, offsetof(Exchange, left), 0, NULL},
    {"uploads", T_BOOL, offsetof(Exchange, uploads), 0, NULL},
    {NULL},
};

COLLECTED(exchange, Exchange, client, core)

/* As above, for a class in Python that adds no attributes: what Python has for classes looks through
 * all of its bases for some. It also bounds the recursion of a chain and looks for a `__del__` that
 * came later: an exchange holds others through dicts, tuples and exceptions at most, which bound it,
 * or as what it was served within, which is as deep as those calls were, and has none.
 */
static void
plain_dealloc(Exchange *self)
{
    PyTypeObject *type = Py_TYPE(self);
    exchange_dealloc(self);
    Py_DECREF(type);
}

static PyMethodDef exchange_methods[4];

static PyTypeObject ExchangeType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Fields",
    .tp_doc = "The attributes of an Exchange.",
    .tp_basicsize = sizeof(Exchange),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)exchange_dealloc,
    .tp_traverse = (traverseproc)exchange_traverse,
    .tp_clear = (inquiry)exchange_clear,
    .tp_members = exchange_members,
    .tp_methods = exchange_methods,
};

/* Shelf and Hinge: the one attribute that is read here on each request, of a class in Python --------
 *
 * A look-up by name walks the class and its bases whenever Python's cache has lost it, which on a
 * page of some size is always.
 */

typedef struct {
    PyObject_HEAD
    PyObject *held;
} Holder;

COLLECTED(holder, Holder, held, held)

#define HOLDER(Name, attribute, text) \
    static PyMemberDef Name##_members[] = { \
        {attribute, T_OBJECT_EX, offsetof(Holder, held), 0, NULL}, \
        {NULL}, \
    }; \
    static PyTypeObject Name##Type = { \
        PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed." #Name, \
        .tp_doc = text, \
        .tp_basicsize = sizeof(Holder), \
        .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, \
        .tp_new = PyType_GenericNew, \
        .tp_dealloc = (destructor)holder_dealloc, \
        .tp_traverse = (traverseproc)holder_traverse, \
        .tp_clear = (inquiry)holder_clear, \
        .tp_members = Name##_members, \
    };

HOLDER(Shelf, "cells", "Base of a store: where its cells are now.")
HOLDER(Hinge, "door", "Base of a port: its door now.")

/* Front: what serves is held as above, and a call is nothing but a call of that ----------------------
 *
 * Its classes say so in Python, by a `__call__` that servers look at and that can be overridden or
 * patched. A frame of it on each request is saved by `straight`.
 */

static PyObject *
front_call(Holder *self, PyObject *args, PyObject *kwargs)
{
    if (self->held == NULL) {
        PyErr_SetString(PyExc_AttributeError, "_serve");
        return NULL;
    }
    PyObject *serve = Py_NewRef(self->held), *result; /* it may put another in its place */
    if (kwargs == NULL || PyDict_GET_SIZE(kwargs) == 0)
        result = PyObject_Vectorcall(serve, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args), NULL);
    else
        result = PyObject_Call(serve, args, kwargs);
    Py_DECREF(serve);
    return result;
}

HOLDER(Front, "_serve", "Base of what is called for each request: what serves now.")

/* Sets the slot of this class only. A class below it, and a `__call__` that is put into it later, get
 * Python's own again, and are called.
 */
static PyObject *
front_straight(PyObject *Py_UNUSED(module), PyObject *class)
{
    if (!PyType_Check(class) || class == (PyObject *)&FrontType
        || !PyType_IsSubtype((PyTypeObject *)class, &FrontType)) {
        PyErr_SetString(PyExc_TypeError, "straight() takes a class below Front");
        return NULL;
    }
    ((PyTypeObject *)class)->tp_call = (ternaryfunc)front_call;
    return Py_NewRef(class);
}

static Exchange *
as_exchange(PyObject *object)
{
    if (PyObject_TypeCheck(object, &ExchangeType))
        return (Exchange *)object;
    PyErr_Format(PyExc_TypeError, "an Exchange is needed, not %s", Py_TYPE(object)->tp_name);
    return NULL;
}

/* The status as a number; -1 with an exception. 0: none yet. */
static long
status_of(Exchange *x)
{
    return x->status == NULL ? 0 : PyLong_AsLong(x->status);
}
