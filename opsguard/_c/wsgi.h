/* The WSGI edge, as opsguard_wsgi.edge: Gate, Start (`start_response`) and Body. */

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Holder *port; /* a Hinge */
    PyObject *app, *guarded, *key, *root, *endpoint, *text, *counted, *refuse, *other, *failed, *answer;
    PyObject *keeps, *within;
    PyObject *keeper, *keeping; /* type and function that `keeps` was asked about last */
    char kept;                  /* what it said */
} Gate;

#define GATE_OBJECTS(X) \
    X(port) X(app) X(guarded) X(key) X(root) X(endpoint) X(text) X(counted) X(refuse) X(other) \
    X(failed) X(answer) X(keeps) X(within)

/* `start_response` as the app sees it; as Start of opsguard_wsgi.edge. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Door *door;
    Exchange *exchange;
    PyObject *server, *status, *headers, *write;
    PyObject *id, *other; /* what `headers` is without; NULL: nothing, the second: no such */
    char asked;
    char kept; /* the server keeps the headers in a list, which ours can be put into */
} Start;

/* A body that is made while it is sent; as Body of opsguard_wsgi.edge. */
typedef struct {
    PyObject_HEAD
    Exchange *exchange;
    PyObject *body, *parts, *first;
} Body;

/* Whatever happened, this request is over. An exception that is set stays; 0, or -1 for a new one. */
static int
part(Exchange *x)
{
    Core *core = x->core;
    PyObject *error = take_error();
    int failed = x->closed ? 0 : close_exchange(core, x);
    if (failed < 0 || set_back(core, x) < 0) {
        Py_XDECREF(error);
        return -1;
    }
    give_error(error);
    return 0;
}

/* Start */

/* As keeps_headers() of opsguard_wsgi.gunicorn; -1 with an exception. */
static int
keeps_headers(Gate *gate, PyObject *server)
{
    if (!PyMethod_Check(server))
        return 0;
    PyObject *type = (PyObject *)Py_TYPE(PyMethod_GET_SELF(server));
    PyObject *function = PyMethod_GET_FUNCTION(server);
    if (type == gate->keeper && function == gate->keeping)
        return gate->kept;
    PyObject *said = call_one(gate->keeps, server);
    if (said == NULL)
        return -1;
    PyObject *before = gate->keeper, *with = gate->keeping;
    gate->keeper = Py_NewRef(type); /* all of it, before a finalizer of those may run */
    gate->keeping = Py_NewRef(function);
    int keeps = gate->kept = said == Py_True;
    Py_DECREF(said);
    Py_XDECREF(before);
    Py_XDECREF(with);
    return keeps;
}

/* Put (name, id) into the list. 0 or -1. */
static int
add_id(PyObject *list, PyObject *name, PyObject *id)
{
    PyObject *pair = pair_of(name, id);
    int failed = pair == NULL ? -1 : PyList_Append(list, pair);
    Py_XDECREF(pair);
    return failed;
}

/* Put ours behind the headers that the server has taken. 0 or -1. */
static int
hand_over(Start *self)
{
    PyObject *kept = PyObject_GetAttr(PyMethod_GET_SELF(self->server), names.headers);
    int failed = -1;
    if (kept != NULL && PyList_CheckExact(kept))
        failed = add_id(kept, self->door->request, self->id);
    else if (kept != NULL)
        PyErr_SetString(PyExc_TypeError, "the server's headers are no list any more");
    if (!failed && self->other != NULL)
        failed = add_id(kept, self->door->correlation, self->other);
    Py_XDECREF(kept);
    return failed < 0 ? reported(self->door->core, names.site_head) : 0;
}

/* The server answers, while no exception is set. */
static void
is_500(Exchange *x)
{
    PyObject *code = PyLong_FromLong(500);
    if (code == NULL)
        PyErr_Clear();
    else
        put(&x->status, code);
    Py_XDECREF(code);
}

/* The app is done and has started no answer: it may have had a websocket of its own. 0 or -1. */
ONE_COPY int
nothing_started(Start *self)
{
    PyObject *done = PyObject_CallMethodNoArgs((PyObject *)self->exchange, names.taken_over);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* There is something to send now, or nothing at all: the server hears of the start. 0 or -1. */
static int
start_go(Start *self)
{
    if (self->status == NULL)
        return self->asked ? 0 : nothing_started(self);
    PyObject *status = self->status, *headers = self->headers;
    self->status = self->headers = NULL;
    self->asked = 1;
    PyObject *args[] = {status, headers};
    Py_XSETREF(self->write, PyObject_Vectorcall(self->server, args, 2, NULL));
    Py_DECREF(status);
    Py_DECREF(headers);
    if (self->write != NULL && (self->id == NULL || hand_over(self) == 0))
        return 0;
    if (PyErr_ExceptionMatches(PyExc_Exception)) { /* it refuses the headers, and answers for that */
        PyObject *error = take_error();
        is_500(self->exchange);
        give_error(error);
    }
    return -1;
}

static PyObject *
start_write(Start *self, PyObject *data)
{
    if (start_go(self) < 0)
        return NULL;
    Py_ssize_t size = PyObject_Size(data);
    if (size < 0)
        return NULL;
    self->exchange->sent += size;
    if (self->write == NULL) {
        PyErr_SetString(PyExc_AssertionError, "write() before start_response()");
        return NULL;
    }
    return call_one(self->write, data);
}

static PyObject *
start_go_method(Start *self, PyObject *Py_UNUSED(nothing))
{
    if (start_go(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
start_fail(Start *self, PyObject *Py_UNUSED(nothing))
{
    if (!self->asked)
        is_500(self->exchange);
    Py_RETURN_NONE;
}

static PyMethodDef start_methods[] = {
    {"write", (PyCFunction)start_write, METH_O, "What PEP 3333 calls the write() callable."},
    {"go", (PyCFunction)start_go_method, METH_NOARGS, "There is something to send now."},
    {"fail", (PyCFunction)start_fail, METH_NOARGS, "The app failed and is not answered for."},
    {NULL},
};

/* The number of a status line, as int(status[:3]); new reference. */
static PyObject *
code_of(PyObject *status)
{
    if (is_ascii(status) && PyUnicode_GET_LENGTH(status) >= 3) {
        const Py_UCS1 *text = PyUnicode_1BYTE_DATA(status);
        if (Py_ISDIGIT(text[0]) && Py_ISDIGIT(text[1]) && Py_ISDIGIT(text[2]))
            return PyLong_FromLong(100 * (text[0] - '0') + 10 * (text[1] - '0') + text[2] - '0');
    }
    PyObject *digits = PySequence_GetSlice(status, 0, 3);
    if (digits == NULL)
        return NULL;
    PyObject *code = PyNumber_Long(digits);
    Py_DECREF(digits);
    return code;
}

/* As Start._again of opsguard_wsgi.edge: another start, when the server has heard of one. */
static PyObject *
start_again(Start *self, PyObject *status, PyObject *headers, PyObject *failure)
{
    Exchange *x = self->exchange;
    int failed = PyObject_IsTrue(failure);
    PyObject *code = failed < 0 ? NULL : code_of(status);
    if (code == NULL)
        return NULL;
    PyObject *begun = Py_XNewRef(x->status), *write = NULL;
    double first_byte = x->first_byte;
    PyObject *ours = head(self->door, x, code, headers);
    Py_DECREF(code);
    if (ours != NULL) {
        write = PyObject_CallFunctionObjArgs(self->server, status, ours, failed ? failure : NULL, NULL);
        Py_DECREF(ours);
    }
    if (write == NULL) {
        Py_XSETREF(x->status, begun); /* a number: nothing runs when it goes */
        x->first_byte = first_byte;
        return NULL;
    }
    Py_XDECREF(begun);
    Py_XSETREF(self->write, write);
    return PyCFunction_New(&start_methods[0], (PyObject *)self);
}

static PyObject *
start_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Start *self = (Start *)callable;
    Py_ssize_t given = PyVectorcall_NARGS(flags), named = keywords == NULL ? 0 : PyTuple_GET_SIZE(keywords);
    PyObject *failure = given + named == 3 ? args[2] : Py_None;
    if (given < 2 || given + named > 3
        || (named && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(keywords, 0), "exc_info") != 0)) {
        PyErr_SetString(PyExc_TypeError, "start_response(status, headers, exc_info=None)");
        return NULL;
    }
    PyObject *status = args[0], *headers = args[1];
    if (self->asked)
        return start_again(self, status, headers, failure);
    if (self->status != NULL && failure == Py_None) {
        PyErr_SetString(PyExc_AssertionError, "start_response() was called twice");
        return NULL;
    }
    Exchange *x = self->exchange;
    PyObject *code = code_of(status), *ours = NULL;
    if (code == NULL)
        return NULL;
    int both = with_both(self->door, x);
    int owed = self->kept && !is_set(x->extra) && sound(x->request_id)
               && (!both || sound(x->correlation_id));
    PyObject *id = owed ? Py_NewRef(x->request_id) : NULL;
    PyObject *other = owed && both ? Py_NewRef(x->correlation_id) : NULL;
    if (owed)
        ours = started(self->door, x, code, headers, 0);
    if (ours == NULL) {
        Py_CLEAR(id);
        Py_CLEAR(other);
        if (!PyErr_Occurred())
            ours = head(self->door, x, code, headers);
    }
    Py_DECREF(code);
    if (ours == NULL)
        return NULL;
    Py_XSETREF(self->id, id);
    Py_XSETREF(self->other, other);
    Py_XSETREF(self->status, Py_NewRef(status));
    Py_XSETREF(self->headers, ours);
    return PyCFunction_New(&start_methods[0], callable);
}

static PyMemberDef start_members[] = {
    {"asked", T_BOOL, offsetof(Start, asked), READONLY, "The server has heard of a start."},
    {"headers", T_OBJECT, offsetof(Start, headers), READONLY, "Of a start that it has not heard of."},
    {NULL},
};

COLLECTED(start, Start, door, other)

static PyTypeObject StartType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Start",
    .tp_basicsize = sizeof(Start),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL
                | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Start, call),
    .tp_dealloc = (destructor)start_dealloc,
    .tp_traverse = (traverseproc)start_traverse,
    .tp_clear = (inquiry)start_clear,
    .tp_methods = start_methods,
    .tp_members = start_members,
};

/* Body */

/* Tell the exchange of an exception, while none is set. */
static void
tell(Exchange *x, PyObject *error)
{
    PyObject *done = PyObject_CallMethodOneArg((PyObject *)x, names.fail, error);
    if (done == NULL)
        PyErr_Clear(); /* the app's own exception counts */
    Py_XDECREF(done);
}

static PyObject *
body_next(Body *self)
{
    PyObject *data = self->first;
    if (data != NULL)
        self->first = NULL;
    else if (self->parts == NULL || (data = PyIter_Next(self->parts)) == NULL) {
        if (!PyErr_Occurred()) {
            finish_exchange(self->exchange->core, self->exchange);
        } else if (PyErr_ExceptionMatches(PyExc_Exception)) {
            PyObject *error = take_error();
            tell(self->exchange, error);
            give_error(error);
        }
        return NULL;
    }
    Py_ssize_t size = length_of(data);
    if (size < 0) {
        Py_DECREF(data);
        return NULL;
    }
    self->exchange->sent += size;
    return data;
}

/* The server is done, at the end or before it: then the client has left. 0 or -1. */
static int
body_end(Body *self)
{
    Exchange *x = self->exchange;
    PyObject *close = NULL, *done = NULL;
    if (optional(self->body, names.close, &close) > 0) {
        done = PyObject_CallNoArgs(close);
        Py_DECREF(close);
        Py_XDECREF(done);
    }
    PyObject *error = take_error();
    int head_only = x->method != NULL && same(x->method, names.head) > 0 && !is_set(x->error);
    if (head_only) /* some servers do not ask for a body they will not send */
        finish_exchange(x->core, x);
    if (error != NULL)
        PyErr_Clear();
    give_error(error);
    if (part(x) < 0)
        return -1;
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *
body_close(Body *self, PyObject *Py_UNUSED(nothing))
{
    if (body_end(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* Nobody has closed it. */
static void
body_finalize(Body *self)
{
    end_unheard((PyObject *)self, self->exchange);
}

HOLDING(body, Body, exchange, first)

static void
body_dealloc(Body *self)
{
    if (PyObject_CallFinalizerFromDealloc((PyObject *)self) < 0)
        return;
    PyObject_GC_UnTrack(self);
    body_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef body_methods[] = {
    {"close", (PyCFunction)body_close, METH_NOARGS, "The server is done with the body."},
    {NULL},
};

static PyTypeObject BodyType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Body",
    .tp_basicsize = sizeof(Body),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)body_dealloc,
    .tp_finalize = (destructor)body_finalize,
    .tp_traverse = (traverseproc)body_traverse,
    .tp_clear = (inquiry)body_clear,
    .tp_iter = PyObject_SelfIter,
    .tp_iternext = (iternextfunc)body_next,
    .tp_methods = body_methods,
};

/* Gate */

/* As _whole of opsguard_wsgi.edge; takes the reference of the body and gives it back. */
static PyObject *
whole(Exchange *x, PyObject *body, Start *start)
{
    if (start_go(start) < 0)
        goto failed;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(body); i++) {
        Py_ssize_t size = length_of(PySequence_Fast_GET_ITEM(body, i));
        if (size < 0)
            goto failed;
        x->sent += size;
    }
    if (finish_exchange(x->core, x) < 0 || part(x) < 0)
        goto failed;
    return body;
failed:
    Py_DECREF(body);
    return NULL;
}

/* The body of a request that is served within another one, whose context who asked for it has again;
 * takes the reference of the body.
 */
static PyObject *
handed_back(Gate *gate, Exchange *x, Body *body)
{
    PyObject *args[] = {(PyObject *)x, (PyObject *)body}, *within = NULL;
    if (set_back(x->core, x) == 0)
        within = PyObject_Vectorcall(gate->within, args, 2, NULL);
    Py_DECREF(body);
    return within;
}

/* As _streamed of opsguard_wsgi.edge; takes the reference of the body. */
static PyObject *
streamed(Gate *gate, Exchange *x, PyObject *body, Start *start)
{
    Body *self = PyObject_GC_New(Body, &BodyType);
    PyObject *error;
    if (self == NULL) {
        Py_DECREF(body);
        return NULL;
    }
    self->exchange = (Exchange *)Py_NewRef(x);
    self->body = body;
    self->first = NULL;
    self->parts = PyObject_GetIter(body);
    PyObject_GC_Track(self);
    if (self->parts != NULL)
        self->first = PyIter_Next(self->parts);
    if (PyErr_Occurred()) { /* the app failed: nothing was sent, so it can be answered for */
        if (!PyErr_ExceptionMatches(PyExc_Exception))
            goto failed;
        PyObject *raised = take_error();
        Py_XSETREF(self->parts, PyObject_CallFunctionObjArgs(gate->answer, (PyObject *)x, raised,
                                                             (PyObject *)start, NULL));
        Py_DECREF(raised);
        if (self->parts == NULL)
            goto failed;
        if (!start->asked && (self->first = PyIter_Next(self->parts)) == NULL && PyErr_Occurred())
            goto failed;
    }
    if (start_go(start) == 0)
        return is_set(x->outer) ? handed_back(gate, x, self) : (PyObject *)self;
failed: /* the server never gets the body, so it cannot close it */
    error = take_error(); /* nothing may be called while it is set */
    tell(x, error);
    if (!start->asked)
        is_500(x); /* the server has not heard of what the app had started */
    body_end(self);
    go_on_with(error);
    Py_DECREF(self);
    return NULL;
}

/* A path of the environ as the text it stands for; new reference. NULL without an exception: none. */
static PyObject *
path_text(Gate *gate, PyObject *environ, PyObject *key)
{
    PyObject *text = PyDict_GetItemWithError(environ, key);
    if (text == NULL)
        return NULL;
    if (PyUnicode_CheckExact(text) && PyUnicode_IS_COMPACT_ASCII(text))
        return PyUnicode_GET_LENGTH(text) ? Py_NewRef(text) : NULL;
    Py_INCREF(text);
    int there = PyObject_IsTrue(text);
    PyObject *plain = there > 0 ? call_one(gate->text, text) : NULL;
    Py_DECREF(text);
    return plain;
}

/* As open_exchange of opsguard_wsgi.types; new reference. */
static Exchange *
open_environ(Gate *gate, Door *door, PyObject *environ)
{
    Exchange *x = NULL;
    PyObject *method = NULL, *path = NULL, *routed = NULL, *root = NULL, *peer = NULL, *headers = NULL;
    PyObject *mounted = NULL;
    if ((method = needed(environ, names.request_method)) == NULL
        || (headers = gather(door, environ)) == NULL)
        goto done;
    if ((routed = path_text(gate, environ, names.path_info)) == NULL
        && (PyErr_Occurred() || (routed = PyUnicode_New(0, 0)) == NULL))
        goto done;
    root = path_text(gate, environ, names.script_name);
    if (root == NULL && PyErr_Occurred())
        goto done;
    path = root == NULL ? Py_NewRef(routed) : PyUnicode_Concat(root, routed);
    if (path == NULL)
        goto done;
    peer = item(environ, names.remote_addr);
    if (peer == NULL && PyErr_Occurred())
        goto done;
    int there = peer == NULL ? 0 : PyObject_IsTrue(peer);
    if (there < 0)
        goto done;
    x = open_exchange(door, method, path, routed, there ? peer : Py_None, headers, environ);
    if (x == NULL)
        goto done;
    mounted = item(environ, names.script_name); /* as it is written there */
    if (mounted == NULL || !PyUnicode_Check(mounted))
        Py_XSETREF(mounted, PyErr_Occurred() ? NULL : PyUnicode_New(0, 0));
    if (mounted == NULL || PyDict_SetItem(environ, gate->key, (PyObject *)x) < 0
        || PyDict_SetItem(environ, gate->root, mounted) < 0)
        Py_CLEAR(x);
done:
    Py_XDECREF(method);
    Py_XDECREF(path);
    Py_XDECREF(routed);
    Py_XDECREF(root);
    Py_XDECREF(peer);
    Py_XDECREF(headers);
    Py_XDECREF(mounted);
    return x;
}

/* The app's answer, or ours instead of it; new reference. */
static PyObject *
answered(Gate *gate, Exchange *x, PyObject *environ, Start *start)
{
    if (gate->endpoint != Py_None && enter_by(x->core, x, gate->endpoint, environ) < 0)
        return NULL;
    PyObject *body = NULL;
    if (is_set(x->work) || is_set(x->reply)) {
        body = PyObject_CallFunctionObjArgs(gate->refuse, (PyObject *)x, environ, (PyObject *)start, NULL);
        if (body == NULL)
            return NULL;
        if (body == Py_None) /* it took a look outside, and the app is to answer */
            Py_CLEAR(body);
    }
    if (body == NULL) {
        if (x->uploads && x->received == 0) {
            PyObject *done = PyObject_CallFunctionObjArgs(gate->counted, environ, (PyObject *)x, NULL);
            if (done == NULL)
                return NULL;
            Py_DECREF(done);
        }
        PyObject *args[] = {environ, (PyObject *)start};
        body = PyObject_Vectorcall(gate->app, args, 2, NULL);
        if (body == NULL)
            return NULL;
    }
    if (PyList_Check(body) || PyTuple_Check(body))
        return whole(x, body, start);
    PyObject *wrapper = PyDict_GetItemWithError(environ, names.file_wrapper);
    if (wrapper != NULL && PyType_Check(wrapper) && PyObject_TypeCheck(body, (PyTypeObject *)wrapper)) {
        PyObject *file = PyObject_CallFunctionObjArgs(gate->other, (PyObject *)x, body, environ,
                                                      (PyObject *)start, NULL);
        Py_DECREF(body);
        return file;
    }
    return streamed(gate, x, body, start);
}

static PyObject *
gate_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Gate *self = (Gate *)callable;
    PyObject *held = self->port->held;
    if (PyVectorcall_NARGS(flags) != 2 || keywords != NULL || !PyDict_CheckExact(args[0]) || held == NULL
        || !Py_IS_TYPE(held, &DoorType))
        return PyObject_Vectorcall(self->guarded, args, flags, keywords);
    PyObject *environ = args[0];
    Door *door = (Door *)Py_NewRef(held); /* `override` may exchange it from here on */
    int nested = PyDict_Contains(environ, self->key);
    if (nested) {
        Py_DECREF(door);
        return nested < 0 ? NULL : PyObject_Vectorcall(self->app, args, flags, NULL);
    }
    int kept = keeps_headers(self, args[1]);
    if (kept < 0 && reported(door->core, names.site_head) < 0) {
        Py_DECREF(door);
        return NULL;
    }
    Exchange *x = open_environ(self, door, environ);
    if (x == NULL) {
        int failed = reported(door->core, names.site_open);
        Py_DECREF(door);
        return failed < 0 ? NULL : PyObject_Vectorcall(self->app, args, flags, NULL);
    }
    Start *start = PyObject_GC_New(Start, &StartType);
    if (start == NULL) {
        Py_DECREF(door);
        Py_DECREF(x);
        return NULL;
    }
    start->call = start_call;
    start->door = door;
    start->exchange = x;
    start->server = Py_NewRef(args[1]);
    start->status = start->headers = start->write = start->id = start->other = NULL;
    start->asked = 0;
    start->kept = kept > 0;
    PyObject_GC_Track(start);
    PyObject *body = answered(self, x, environ, start);
    if (body == NULL) {
        PyObject *error = take_error();
        body = PyObject_CallFunctionObjArgs(self->failed, (PyObject *)x, error, (PyObject *)start, NULL);
        if (body == Py_None) /* it goes on to the server */
            Py_CLEAR(body);
        if (body == NULL)
            go_on_with(error);
        else
            Py_DECREF(error);
    }
    Py_DECREF(start);
    return body;
}

static PyObject *
gate_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"app", "port", "guarded", "key", "root", "endpoint", "text", "counted",
                           "refuse", "other", "failed", "answer", "keeps", "within", NULL};
    PyObject *app, *port, *guarded, *key, *root, *endpoint, *text, *counted, *refuse, *other;
    PyObject *failed, *answer, *keeps, *within;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OO!OUUOOOOOOOOO", keys, &app, &HingeType, &port,
                                     &guarded, &key, &root, &endpoint, &text, &counted, &refuse, &other,
                                     &failed, &answer, &keeps, &within))
        return NULL;
    Gate *self = (Gate *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->call = gate_call;
    GATE_OBJECTS(KEEP)
    return (PyObject *)self;
}

COLLECTED(gate, Gate, port, keeping)

static PyTypeObject GateType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Gate",
    .tp_basicsize = sizeof(Gate),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = gate_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Gate, call),
    .tp_dealloc = (destructor)gate_dealloc,
    .tp_traverse = (traverseproc)gate_traverse,
    .tp_clear = (inquiry)gate_clear,
};
