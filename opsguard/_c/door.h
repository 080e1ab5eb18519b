/* Door, as the Port of `plan`: a request is opened, and its answer gets our headers. */

enum { WANTED = 16 };

typedef struct {
    PyObject_HEAD
    Core *core;
    PyTypeObject *exchange;
    PyObject *request, *correlation; /* our headers' names; the second may be None */
    PyObject *slow_head, *wanted;
    PyObject *spell, *spelled; /* a header's name as the protocol writes it; those asked so far */
    unsigned long long lengths; /* bit n: a wanted name has n characters */
    PyObject *names[WANTED][2]; /* of `wanted`, as the protocol writes them and ours; borrowed */
    int named;                  /* how many; -1: too many, or no bytes */
    Py_ssize_t request_length, correlation_length; /* of the headers' names; -1: there is none */
    int requests;               /* its exchanges are requests, not websockets */
    int always;                 /* every answer carries the second header */
} Door;

/* Let instances of this class go by plain_dealloc, if they are nothing but an Exchange. */
static void
let_go_plainly(PyTypeObject *class)
{
    if (PyType_HasFeature(class, Py_TPFLAGS_HEAPTYPE) && class->tp_basicsize == ExchangeType.tp_basicsize
        && class->tp_dictoffset == 0 && class->tp_weaklistoffset == 0 && class->tp_finalize == NULL
        && class->tp_del == NULL)
        class->tp_dealloc = (destructor)plain_dealloc;
}

/* The characters of a name, bytes or ASCII text; NULL for anything else. */
static const char *
characters(PyObject *name, Py_ssize_t *length)
{
    if (PyBytes_CheckExact(name)) {
        *length = PyBytes_GET_SIZE(name);
        return PyBytes_AS_STRING(name);
    }
    if (PyUnicode_CheckExact(name) && PyUnicode_IS_COMPACT_ASCII(name)) {
        *length = PyUnicode_GET_LENGTH(name);
        return (const char *)PyUnicode_1BYTE_DATA(name);
    }
    return NULL;
}

static PyObject *
door_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"core", "exchange", "requests", "request", "correlation", "spell", "always",
                           "head", "wanted", NULL};
    PyObject *core, *exchange, *request, *correlation, *spell, *slow_head, *wanted;
    int requests, always;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$O!O!pOOOpOO!", keys, &CoreType, &core, &PyType_Type,
                                     &exchange, &requests, &request, &correlation, &spell, &always,
                                     &slow_head,
                                     &PyDict_Type, &wanted))
        return NULL;
    if (!PyType_IsSubtype((PyTypeObject *)exchange, &ExchangeType)) {
        PyErr_SetString(PyExc_TypeError, "a type of Exchange is needed");
        return NULL;
    }
    Door *self = (Door *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    let_go_plainly((PyTypeObject *)exchange);
    self->core = (Core *)Py_NewRef(core);
    self->exchange = (PyTypeObject *)Py_NewRef(exchange);
    self->request = Py_NewRef(request);
    self->correlation = Py_NewRef(correlation);
    self->slow_head = Py_NewRef(slow_head);
    self->wanted = Py_NewRef(wanted);
    self->spell = Py_NewRef(spell);
    self->spelled = PyDict_New();
    if (self->spelled == NULL) {
        Py_DECREF(self);
        return NULL;
    }
    self->requests = requests;
    self->always = always;
    if (characters(request, &self->request_length) == NULL)
        self->request_length = -1;
    if (characters(correlation, &self->correlation_length) == NULL)
        self->correlation_length = -1;
    PyObject *name, *ours;
    Py_ssize_t at = 0;
    while (PyDict_Next(wanted, &at, &name, &ours)) {
        if (self->named == WANTED || !PyBytes_CheckExact(name))
            self->named = -1;
        if (self->named >= 0) {
            self->names[self->named][0] = name;
            self->names[self->named++][1] = ours;
        }
        Py_ssize_t length = PyObject_Size(name);
        if (length < 0) {
            Py_DECREF(self);
            return NULL;
        }
        self->lengths |= 1ULL << (length & 63);
    }
    return (PyObject *)self;
}

COLLECTED(door, Door, core, spelled)

/* As Plan._identify for wanted headers of which each is a credential: 1. 0: there are others; or -1.
 * The ids are fresh then, and there is no body.
 */
static int
identified(Core *core, Exchange *x, PyObject *headers)
{
    PyObject *key = NULL, *authorization = NULL;
    if (PyTuple_CheckExact(headers) && PyTuple_GET_SIZE(headers) == 2) { /* see as_headers */
        key = PyTuple_GET_ITEM(headers, 0);
        authorization = PyTuple_GET_ITEM(headers, 1);
    } else {
        if (core->key_header == Py_None || !PyDict_CheckExact(headers))
            return 0;
        if ((key = PyDict_GetItemWithError(headers, core->key_header)) == NULL && PyErr_Occurred())
            return -1;
        authorization = PyDict_GetItemWithError(headers, names.authorization);
        if (authorization == NULL && PyErr_Occurred())
            return -1;
        if (PyDict_GET_SIZE(headers) != (key != NULL) + (authorization != NULL))
            return 0;
        key = key == NULL ? names.empty : key;
        authorization = authorization == NULL ? names.empty : authorization;
    }
    if (!PyUnicode_CheckExact(key) || !PyUnicode_CheckExact(authorization))
        return 0;
    if (PyUnicode_GET_LENGTH(key) || PyUnicode_GET_LENGTH(authorization)) {
        x->credentials = PyTuple_CheckExact(headers) ? Py_NewRef(headers)
                                                     : pair_of(key, authorization);
        if (x->credentials == NULL)
            return -1;
    }
    x->request_id = fresh();
    if (x->request_id == NULL)
        return -1;
    x->correlation_id = Py_NewRef(x->request_id);
    return 1;
}

/* As the function of Plan.open_with; new reference. */
static Exchange *
open_exchange(Door *self, PyObject *method, PyObject *path, PyObject *routed, PyObject *peer,
              PyObject *headers, PyObject *source)
{
    Core *core = self->core;
    Exchange *x = (Exchange *)self->exchange->tp_alloc(self->exchange, 0);
    if (x == NULL)
        return NULL;
    x->started = now();
    x->plan = Py_NewRef(core->plan);
    x->method = Py_NewRef(method);
    x->path = Py_NewRef(path);
    x->routed = Py_NewRef(routed);
    x->client = Py_NewRef(peer);
    x->source = Py_NewRef(source);
    x->status = Py_NewRef(zero);
    x->charged = Py_NewRef(nothing);
    if (self->requests)
        x->core = (Core *)Py_NewRef(core);
    if (headers == Py_None) {
        x->request_id = fresh();
        if (x->request_id == NULL)
            goto failed;
        x->correlation_id = Py_NewRef(x->request_id);
    } else {
        int usual = identified(core, x, headers);
        PyObject *done = usual ? NULL : PyObject_CallFunctionObjArgs(core->identify, (PyObject *)x, headers, NULL);
        if (usual < 0 || (!usual && done == NULL))
            goto failed;
        Py_XDECREF(done);
    }
    if (core->resolve != Py_None) {
        PyObject *client = PyObject_CallFunctionObjArgs(core->resolve, peer, headers, NULL);
        if (client == NULL)
            goto failed;
        put(&x->client, client);
        Py_DECREF(client);
    }
    PyObject *outer, *token, *error, *work = NULL;
    if (PyContextVar_Get(core->current, Py_None, &outer) < 0)
        goto failed;
    if (goes_on(outer))
        x->outer = outer;
    else
        Py_DECREF(outer);
    if ((token = PyContextVar_Set(core->current, (PyObject *)x)) == NULL)
        goto failed;
    if (self->requests && core->served >> mark_of(routed) & 1) {
        work = PyDict_GetItemWithError(core->endpoints, routed);
        if (work == NULL && PyErr_Occurred())
            goto not_opened;
    }
    if (work != NULL) {
        put(&x->work, work);
        put(&x->endpoint, routed);
    } else if (core->edge != Py_None) {
        PyObject *reply = call_one(core->edge, (PyObject *)x);
        if (reply == NULL)
            goto not_opened;
        put(&x->reply, reply);
        Py_DECREF(reply);
    }
    Py_DECREF(token);
    return x;
not_opened: /* nobody will close it */
    error = take_error();
    if (PyContextVar_Reset(core->current, token) < 0)
        PyErr_Clear();
    Py_DECREF(token);
    give_error(error);
failed:
    Py_DECREF(x);
    return NULL;
}

static PyObject *
door_open(Door *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 6) {
        PyErr_SetString(PyExc_TypeError, "open() takes six arguments");
        return NULL;
    }
    return (PyObject *)open_exchange(self, args[0], args[1], args[2], args[3], args[4], args[5]);
}

/* Whether a name may be `ours`, which is as long, whatever its case. */
static int
like(const char *text, Py_ssize_t length, PyObject *ours)
{
    const char *wanted = characters(ours, &length);
    for (Py_ssize_t i = 0; i < length; i++)
        if (Py_TOLOWER(text[i]) != Py_TOLOWER(wanted[i]))
            return 0;
    return 1;
}

/* A list of these headers with room for two more, or NULL without an exception where the function in
 * Python has to look closer.
 */
static PyObject *
copied(Door *self, PyObject *headers, Py_ssize_t extra)
{
    if (!PyList_CheckExact(headers) && !PyTuple_CheckExact(headers))
        return NULL;
    Py_ssize_t count = PySequence_Fast_GET_SIZE(headers);
    PyObject **pairs = PySequence_Fast_ITEMS(headers);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *pair = pairs[i];
        if ((!PyTuple_CheckExact(pair) && !PyList_CheckExact(pair)) || PySequence_Fast_GET_SIZE(pair) != 2)
            return NULL;
        Py_ssize_t length = 0;
        const char *text = characters(PySequence_Fast_ITEMS(pair)[0], &length);
        if (text == NULL || (length == self->request_length && like(text, length, self->request))
            || (length == self->correlation_length && like(text, length, self->correlation)))
            return NULL;
    }
    PyObject *list = PyList_New(count + extra);
    if (list == NULL)
        return NULL;
    if (PySequence_Fast_GET_SIZE(headers) != count) { /* the collector ran, and somebody's finalizer */
        Py_DECREF(list);
        return NULL;
    }
    pairs = PySequence_Fast_ITEMS(headers);
    for (Py_ssize_t i = 0; i < count; i++)
        PyList_SET_ITEM(list, i, Py_NewRef(pairs[i]));
    return list;
}

/* An id as the protocol writes it; new reference. */
static PyObject *
value_of(Door *self, PyObject *id)
{
    if (!PyBytes_CheckExact(self->request))
        return PyObject_Str(id); /* the same object, if it is a text already */
    return is_ascii(id) ? PyBytes_FromStringAndSize((const char *)PyUnicode_1BYTE_DATA(id),
                                                    PyUnicode_GET_LENGTH(id))
                        : PyUnicode_AsUTF8String(id);
}

enum { SPELLINGS = 256 };

/* A header's name as the protocol writes it; new reference. */
static PyObject *
spelled(Door *self, PyObject *name)
{
    PyObject *known = PyDict_GetItemWithError(self->spelled, name);
    if (known != NULL || PyErr_Occurred())
        return Py_XNewRef(known);
    known = call_one(self->spell, name);
    if (known != NULL && PyDict_GET_SIZE(self->spelled) < SPELLINGS
        && PyDict_SetItem(self->spelled, name, known) < 0)
        Py_CLEAR(known);
    return known;
}

/* Put these (name, text) pairs behind the headers. 0 or -1. */
static int
add_extra(Door *self, PyObject *list, PyObject *extra)
{
    if (!PyTuple_CheckExact(extra)) { /* it puts them there itself: see _limits.c */
        PyObject *args[] = {list, self->spell};
        PyObject *done = PyObject_Vectorcall(extra, args, 2, NULL);
        Py_XDECREF(done);
        return done == NULL ? -1 : 0;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(extra); i++) {
        PyObject *given = PyTuple_GET_ITEM(extra, i);
        if (!PyTuple_CheckExact(given) || PyTuple_GET_SIZE(given) != 2
            || !PyUnicode_Check(PyTuple_GET_ITEM(given, 1))) {
            PyErr_SetString(PyExc_TypeError, "an extra header is a pair of texts");
            return -1;
        }
        PyObject *name = spelled(self, PyTuple_GET_ITEM(given, 0));
        PyObject *value = name == NULL ? NULL : value_of(self, PyTuple_GET_ITEM(given, 1));
        PyObject *pair = value == NULL ? NULL : pair_of(name, value);
        int failed = pair == NULL ? -1 : PyList_Append(list, pair);
        Py_XDECREF(name);
        Py_XDECREF(value);
        Py_XDECREF(pair);
        if (failed < 0)
            return -1;
    }
    return 0;
}

/* Whether it may stand in a header as it is. Ours do; an app may have set its own. */
static int
sound(PyObject *id)
{
    if (id == NULL || !is_ascii(id) || PyUnicode_GET_LENGTH(id) == 0)
        return 0;
    const Py_UCS1 *text = PyUnicode_1BYTE_DATA(id), *end = text + PyUnicode_GET_LENGTH(id);
    while (text < end && *text > ' ' && *text < 127)
        text++;
    return text == end;
}

/* Whether the answer to this request carries both ids. */
static inline int
with_both(Door *self, Exchange *x)
{
    return self->correlation != Py_None && (self->always || x->correlated);
}

/* The answer starts: a copy of its headers with room for `extra` more, new reference. NULL without an
 * exception where the function in Python has to look closer.
 */
static PyObject *
started(Door *self, Exchange *x, PyObject *status, PyObject *headers, Py_ssize_t extra)
{
    PyObject *list = copied(self, headers, extra);
    if (list == NULL || x->request_id == NULL || x->correlation_id == NULL) {
        Py_XDECREF(list);
        return NULL;
    }
    put(&x->status, status);
    x->first_byte = now();
    return list;
}

/* As the function of Plan.head_with; new reference. */
static PyObject *
head(Door *self, Exchange *x, PyObject *status, PyObject *headers)
{
    int both = with_both(self, x);
    PyObject *list = started(self, x, status, headers, 1 + both);
    if (list == NULL) {
        if (PyErr_Occurred())
            return NULL;
        return PyObject_CallFunctionObjArgs(self->slow_head, (PyObject *)x, status, headers, NULL);
    }
    Py_ssize_t at = PyList_GET_SIZE(list) - 1 - both;
    PyObject *value = value_of(self, x->request_id);
    PyObject *pair = value == NULL ? NULL : pair_of(self->request, value);
    if (pair == NULL)
        goto failed;
    PyList_SET_ITEM(list, at, pair);
    if (both) {
        if (x->correlation_id != x->request_id) {
            Py_DECREF(value);
            value = value_of(self, x->correlation_id);
        }
        pair = value == NULL ? NULL : pair_of(self->correlation, value);
        if (pair == NULL)
            goto failed;
        PyList_SET_ITEM(list, at + 1, pair);
    }
    if (is_set(x->extra)) {
        PyObject *extra = Py_NewRef(x->extra);
        int failed = add_extra(self, list, extra);
        Py_DECREF(extra);
        if (failed < 0)
            goto failed;
    }
    Py_DECREF(value);
    return list;
failed:
    Py_XDECREF(value);
    Py_DECREF(list);
    return NULL;
}

static PyObject *
door_head(Door *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "head() takes three arguments");
        return NULL;
    }
    Exchange *x = as_exchange(args[0]);
    return x == NULL ? NULL : head(self, x, args[1], args[2]);
}

/* The wanted request headers of an environ as open() takes them: a dict or None; new reference. */
static PyObject *
gather(Door *door, PyObject *environ)
{
    PyObject *found = NULL, *key, *name;
    Py_ssize_t at = 0;
    while (PyDict_Next(door->wanted, &at, &key, &name)) {
        PyObject *value = Py_XNewRef(PyDict_GetItemWithError(environ, key));
        int there = value == NULL ? 0 : PyObject_IsTrue(value);
        if (value == NULL && PyErr_Occurred())
            there = -1;
        if (there > 0 && found == NULL)
            there = (found = PyDict_New()) == NULL ? -1 : 1;
        if (there > 0)
            there = PyDict_SetItem(found, name, value);
        Py_XDECREF(value);
        if (there < 0) {
            Py_XDECREF(found);
            return NULL;
        }
    }
    return found == NULL ? Py_NewRef(Py_None) : found;
}

static PyObject *
door_gather(Door *self, PyObject *environ)
{
    if (PyDict_Check(environ))
        return gather(self, environ);
    PyErr_SetString(PyExc_TypeError, "an environ is a dict");
    return NULL;
}

static PyMethodDef door_methods[] = {
    {"open", (PyCFunction)(void (*)(void))door_open, METH_FASTCALL, "As Plan.open_with()."},
    {"head", (PyCFunction)(void (*)(void))door_head, METH_FASTCALL, "As Plan.head_with()."},
    {"gather", (PyCFunction)door_gather, METH_O, "As Port.gather."},
    {NULL},
};

static PyTypeObject DoorType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Door",
    .tp_basicsize = sizeof(Door),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = door_new,
    .tp_dealloc = (destructor)door_dealloc,
    .tp_traverse = (traverseproc)door_traverse,
    .tp_clear = (inquiry)door_clear,
    .tp_methods = door_methods,
};
