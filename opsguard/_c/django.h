/* Django's middleware for sync projects, and its first `process_view`, as opsguard_django: Closer,
 * Middle and Entry.
 */

/* Closer: called by a framework when it closes an answer, as the one of opsguard_django -------------- */

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Exchange *exchange;
    int whole;
} Closer;

static PyObject *
closer_call(PyObject *callable, PyObject *const *Py_UNUSED(args), size_t flags, PyObject *keywords)
{
    Closer *self = (Closer *)callable;
    Exchange *x = self->exchange;
    if (PyVectorcall_NARGS(flags) || keywords != NULL) {
        PyErr_SetString(PyExc_TypeError, "it takes no arguments");
        return NULL;
    }
    if (self->whole && finish_exchange(x->core, x) < 0)
        return NULL;
    if (part(x) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
make_closer(Exchange *x, int whole)
{
    Closer *self = (Closer *)CloserType.tp_alloc(&CloserType, 0);
    if (self == NULL)
        return NULL;
    self->call = closer_call;
    self->exchange = (Exchange *)Py_NewRef(x);
    self->whole = whole;
    return (PyObject *)self;
}

static PyObject *
closer_new(PyTypeObject *Py_UNUSED(type), PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    PyObject *exchange;
    int whole;
    if (!PyArg_ParseTuple(args, "Op", &exchange, &whole))
        return NULL;
    Exchange *x = as_exchange(exchange);
    return x == NULL || core_of(x) == NULL ? NULL : make_closer(x, whole);
}

HOLDING(closer, Closer, exchange, exchange)

/* Dropped without a call, as Django's ASGI handler does when sending fails. */
static void
closer_finalize(Closer *self)
{
    end_unheard((PyObject *)self, self->exchange);
}

static void
closer_dealloc(Closer *self)
{
    if (PyObject_CallFinalizerFromDealloc((PyObject *)self) < 0)
        return;
    PyObject_GC_UnTrack(self);
    closer_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject CloserType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Closer",
    .tp_basicsize = sizeof(Closer),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = closer_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Closer, call),
    .tp_dealloc = (destructor)closer_dealloc,
    .tp_finalize = (destructor)closer_finalize,
    .tp_traverse = (traverseproc)closer_traverse,
    .tp_clear = (inquiry)closer_clear,
};

/* Django's middleware, for sync projects under WSGI ---------------------------------------------- */

/* As OpsGuardMiddleware._serve; what is not usual is left to that (`served`) and to _go_on and
 * _finish of the same class.
 */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Holder *port; /* a Hinge */
    PyObject *get_response, *served, *go_on, *finish, *failed, *key, *plain;
    PyObject *lowered; /* lower-case names of response headers, by name: few, as they are ours */
} Middle;

#define MIDDLE_OBJECTS(X) \
    X(port) X(get_response) X(served) X(go_on) X(finish) X(failed) X(key) X(plain)

enum { LOWERED = 64 };

/* The exchange of a usual request; NULL without an exception: it is not one. */
static Exchange *
open_request(Middle *self, Door *door, PyObject *request, PyObject *meta)
{
    Exchange *x = NULL;
    PyObject *path = NULL, *routed = NULL, *headers = NULL;
    PyObject *method = PyDict_GetItemWithError(meta, names.request_method);
    if (method == NULL)
        return NULL;
    PyObject *peer = PyDict_GetItemWithError(meta, names.remote_addr);
    if (peer == NULL && PyErr_Occurred())
        return NULL;
    Py_INCREF(method);
    peer = peer == NULL || !PyUnicode_Check(peer) || PyUnicode_GET_LENGTH(peer) == 0 ? Py_None : peer;
    Py_INCREF(peer);
    if ((path = PyObject_GetAttr(request, names.path)) == NULL
        || (routed = PyObject_GetAttr(request, names.routed)) == NULL
        || (headers = gather(door, meta)) == NULL)
        goto done;
    x = open_exchange(door, method, path, routed, peer, headers, meta);
    if (x != NULL && PyDict_SetItem(meta, self->key, (PyObject *)x) < 0)
        Py_CLEAR(x);
done:
    Py_DECREF(method);
    Py_DECREF(peer);
    Py_XDECREF(path);
    Py_XDECREF(routed);
    Py_XDECREF(headers);
    return x;
}

/* The bytes of a plain answer, which are all there: -1 without an exception for any other answer. */
static Py_ssize_t
size_of(Middle *self, PyObject *response)
{
    if (!PyObject_TypeCheck(response, (PyTypeObject *)self->plain))
        return -1;
    PyObject *parts;
    if (optional(response, names.container, &parts) <= 0)
        return -1;
    Py_ssize_t size = PyList_CheckExact(parts) ? 0 : -1;
    for (Py_ssize_t i = 0; size >= 0 && i < PyList_GET_SIZE(parts); i++) {
        PyObject *one = PyList_GET_ITEM(parts, i);
        size = PyBytes_CheckExact(one) ? size + PyBytes_GET_SIZE(one) : -1;
    }
    Py_DECREF(parts);
    return size;
}

/* The dictionary in which Django keeps an answer's headers; NULL: it has none that we know. */
static PyObject *
header_store(PyObject *response)
{
    PyObject *headers, *store;
    if (optional(response, names.headers, &headers) <= 0)
        return NULL;
    int found = optional(headers, names.store, &store);
    Py_DECREF(headers);
    if (found <= 0)
        return NULL;
    if (!PyDict_CheckExact(store))
        Py_CLEAR(store);
    return store;
}

static PyObject *
lower_name(Middle *self, PyObject *name)
{
    PyObject *lower = Py_XNewRef(PyDict_GetItemWithError(self->lowered, name));
    if (lower != NULL || PyErr_Occurred())
        return lower;
    lower = PyObject_CallMethodNoArgs(name, names.lower);
    if (lower != NULL && PyDict_GET_SIZE(self->lowered) < LOWERED
        && PyDict_SetItem(self->lowered, name, lower) < 0)
        Py_CLEAR(lower);
    return lower;
}

/* Whether it has headers of ours, as the app has sent it before; -1 with an exception. */
static int
sent_before(PyObject *response)
{
    PyObject *ours;
    int found = optional(response, names.added, &ours);
    if (found > 0)
        Py_DECREF(ours);
    return found;
}

/* Our headers, where the app has not set them itself. 0 or -1. */
static int
add_headers(Middle *self, Door *door, Exchange *x, PyObject *response, PyObject *store)
{
    PyObject *status = PyObject_GetAttr(response, names.status_code);
    PyObject *ours = status == NULL ? NULL : head(door, x, status, nothing);
    int failed = ours == NULL ? -1 : 0;
    for (Py_ssize_t i = 0; failed == 0 && i < PyList_GET_SIZE(ours); i++) {
        PyObject *pair = PyList_GET_ITEM(ours, i);
        PyObject *lower = lower_name(self, PyTuple_GET_ITEM(pair, 0));
        PyObject *there = lower == NULL ? NULL : PyDict_SetDefault(store, lower, pair);
        Py_XDECREF(lower);
        if (there == NULL)
            failed = -1;
        else if (there != pair) { /* the app's own */
            failed = PyList_SetSlice(ours, i, i + 1, NULL);
            i--;
        }
    }
    if (failed == 0)
        failed = PyObject_SetAttr(response, names.added, ours);
    Py_XDECREF(status);
    Py_XDECREF(ours);
    return failed;
}

/* As _finish; takes the reference of the answer. */
static PyObject *
finish_response(Middle *self, Door *door, Exchange *x, PyObject *response)
{
    PyObject *closers = NULL, *closer = NULL, *store = NULL;
    Py_ssize_t size = size_of(self, response);
    if (size >= 0 && optional(response, names.closers, &closers) > 0 && PyList_CheckExact(closers)
        && PyList_GET_SIZE(closers) == 0 /* else the app has something to do at the end */
        && !is_set(x->outer) && sent_before(response) == 0)
        store = header_store(response);
    if (store == NULL) {
        Py_XDECREF(closers);
        PyObject *args[] = {(PyObject *)x, response};
        PyObject *finished = PyErr_Occurred() ? NULL : PyObject_Vectorcall(self->finish, args, 2, NULL);
        Py_DECREF(response);
        return finished;
    }
    x->sent = size;
    int failed = add_headers(self, door, x, response, store);
    if (failed == 0)
        closer = make_closer(x, 1);
    if (closer == NULL || PyList_Append(closers, closer) < 0)
        Py_CLEAR(response);
    Py_XDECREF(closer);
    Py_DECREF(closers);
    Py_DECREF(store);
    return response;
}

static PyObject *
middle_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Middle *self = (Middle *)callable;
    PyObject *held = self->port->held;
    if (PyVectorcall_NARGS(flags) != 1 || keywords != NULL || held == NULL || !Py_IS_TYPE(held, &DoorType))
        return PyObject_Vectorcall(self->served, args, flags, keywords);
    Door *door = (Door *)Py_NewRef(held); /* `override` may exchange it from here on */
    PyObject *request = args[0], *meta;
    int usual = optional(request, names.meta, &meta), nested = 0;
    if (usual > 0)
        usual = PyDict_CheckExact(meta) ? PyDict_Contains(meta, names.input) : 0;
    if (usual > 0)
        nested = PyDict_Contains(meta, self->key);
    if (usual <= 0 || nested) {
        Py_XDECREF(meta);
        Py_DECREF(door);
        return usual < 0 || nested < 0 ? NULL : PyObject_Vectorcall(self->served, args, flags, NULL);
    }
    PyObject *response = NULL;
    Exchange *x = open_request(self, door, request, meta);
    Py_DECREF(meta);
    if (x == NULL) {
        if (!PyErr_Occurred())
            response = PyObject_Vectorcall(self->served, args, 1, NULL);
        else if (reported(door->core, names.site_open) == 0)
            response = PyObject_Vectorcall(self->get_response, args, 1, NULL);
        goto done;
    }
    if (is_set(x->work) || is_set(x->reply)) {
        PyObject *more[] = {(PyObject *)x, request};
        response = PyObject_Vectorcall(self->go_on, more, 2, NULL);
        goto done;
    }
    response = PyObject_Vectorcall(self->get_response, args, 1, NULL);
    if (response != NULL)
        response = finish_response(self, door, x, response);
    if (response != NULL)
        goto done;
    PyObject *error = take_error();
    PyObject *more[] = {(PyObject *)x, error};
    Py_XDECREF(PyObject_Vectorcall(self->failed, more, 2, NULL));
    go_on_with(error);
done:
    Py_XDECREF(x);
    Py_DECREF(door);
    return response;
}

static PyObject *
middle_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"port", "get_response", "served", "go_on", "finish", "failed", "key",
                           "plain", NULL};
    PyObject *port, *get_response, *served, *go_on, *finish, *failed, *key, *plain;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$O!OOOOOUO!", keys, &HingeType, &port, &get_response,
                                     &served, &go_on, &finish, &failed, &key, &PyType_Type, &plain))
        return NULL;
    Middle *self = (Middle *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->call = middle_call;
    MIDDLE_OBJECTS(KEEP)
    if ((self->lowered = PyDict_New()) == NULL)
        Py_CLEAR(self);
    return (PyObject *)self;
}

COLLECTED(middle, Middle, port, lowered)

static PyTypeObject MiddleType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Middle",
    .tp_basicsize = sizeof(Middle),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = middle_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Middle, call),
    .tp_dealloc = (destructor)middle_dealloc,
    .tp_traverse = (traverseproc)middle_traverse,
    .tp_clear = (inquiry)middle_clear,
};

/* As OpsGuardMiddleware._enter, the first `process_view`. `templates` gives the endpoint of a route
 * that was seen before; `slow` does the rest.
 */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *slow, *template, *answer, *key, *templates;
} Entry;

#define ENTRY_OBJECTS(X) X(slow) X(template) X(answer) X(key)

/* The endpoint of the route that Django has found; NULL without an exception: none is. */
static PyObject *
endpoint_of(Entry *self, PyObject *request)
{
    PyObject *match, *route, *endpoint = NULL;
    if (optional(request, names.match, &match) <= 0)
        return NULL;
    int found = match == Py_None ? 0 : optional(match, names.route, &route);
    Py_DECREF(match);
    if (found <= 0)
        return NULL;
    if (PyUnicode_CheckExact(route))
        endpoint = known_template(self->templates, self->template, route);
    Py_DECREF(route);
    return endpoint;
}

static PyObject *
entry_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Entry *self = (Entry *)callable;
    PyObject *meta, *found = NULL, *endpoint = NULL, *result = NULL;
    if (PyVectorcall_NARGS(flags) != 4 || keywords != NULL || optional(args[0], names.meta, &meta) <= 0)
        return PyErr_Occurred() ? NULL : PyObject_Vectorcall(self->slow, args, flags, keywords);
    if (PyDict_CheckExact(meta))
        found = Py_XNewRef(PyDict_GetItemWithError(meta, self->key));
    Py_DECREF(meta);
    Exchange *x = found != NULL && PyObject_TypeCheck(found, &ExchangeType) ? (Exchange *)found : NULL;
    if (x != NULL && x->core != NULL && !PyErr_Occurred())
        endpoint = endpoint_of(self, args[0]);
    if (endpoint == NULL) {
        Py_XDECREF(found);
        return PyErr_Occurred() ? NULL : PyObject_Vectorcall(self->slow, args, flags, NULL);
    }
    PyObject *identity = x->identity == NULL ? Py_None : x->identity;
    if (PyObject_SetAttr(args[0], names.identity, identity) == 0) {
        PyObject *known[] = {endpoint, args[1]};
        result = exchange_enter(x, known, 2, NULL);
    }
    if (result != NULL && result != Py_None)
        Py_SETREF(result, call_one(self->answer, result));
    Py_DECREF(endpoint);
    Py_DECREF(found);
    return result;
}

static PyObject *
entry_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"slow", "template", "answer", "key", NULL};
    PyObject *slow, *template, *answer, *key;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OOOU", keys, &slow, &template, &answer, &key))
        return NULL;
    Entry *self = (Entry *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->call = entry_call;
    ENTRY_OBJECTS(KEEP)
    if ((self->templates = PyDict_New()) == NULL)
        Py_CLEAR(self);
    return (PyObject *)self;
}

COLLECTED(entry, Entry, slow, templates)

static PyTypeObject EntryType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Entry",
    .tp_basicsize = sizeof(Entry),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = entry_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Entry, call),
    .tp_dealloc = (destructor)entry_dealloc,
    .tp_traverse = (traverseproc)entry_traverse,
    .tp_clear = (inquiry)entry_clear,
};
