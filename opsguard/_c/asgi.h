/* The ASGI edge, as opsguard_asgi.edge: Edge, Respond (`send`) and Watch (what is awaited). */

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Holder *port; /* a Hinge */
    PyObject *app, *http, *key, *endpoint, *label, *reply, *failed, *observed, *collect, *alone;
    PyObject *sender; /* the type whose method `send` was the last time, and what `alone` said of it */
    int sender_alone;
} Edge;

#define EDGE_OBJECTS(X) \
    X(app) X(port) X(http) X(key) X(endpoint) X(label) X(reply) X(failed) X(observed) X(collect) \
    X(alone)

/* What an app is given for `send`. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Edge *edge;
    Door *door;
    Exchange *exchange;
    PyObject *scope, *send;
} Respond;

/* An awaitable around another: a request, or the last message of its answer. Stands for the
 * coroutines `http` and `_last` of opsguard_asgi.edge.
 */
typedef struct {
    PyObject_HEAD
    PyObject *inner; /* what is awaited now */
    Edge *edge;      /* NULL: this is the last message */
    Exchange *exchange;
    PyObject *scope, *receive, *send, *respond, *message;
    PyObject *error; /* what the app raised, while `_failed` runs */
    char state, running;
} Watch;

enum { NEW, BEGUN, DONE };

/* What `await` would drive; takes the reference, which may be NULL with an exception. */
static PyObject *
driven(PyObject *awaitable)
{
    if (awaitable == NULL || PyCoro_CheckExact(awaitable) || PyGen_CheckExact(awaitable))
        return awaitable;
    PyAsyncMethods *methods = Py_TYPE(awaitable)->tp_as_async;
    PyObject *iterator = NULL;
    if (methods != NULL && methods->am_await != NULL)
        iterator = methods->am_await(awaitable);
    else
        PyErr_Format(PyExc_TypeError, "object %.100s can't be used in 'await' expression",
                     Py_TYPE(awaitable)->tp_name);
    if (iterator != NULL && !PyIter_Check(iterator)) {
        PyErr_Format(PyExc_TypeError, "__await__() returned non-iterator of type '%.100s'",
                     Py_TYPE(iterator)->tp_name);
        Py_CLEAR(iterator);
    }
    Py_DECREF(awaitable);
    return iterator;
}

/* The wanted headers of a request: the two of an API key apart, as most have no other. */
typedef struct {
    PyObject *key, *authorization, *others; /* texts, and a dict */
} Wanted;

/* Our name of a header that is wanted, borrowed; NULL for any other. A handful is looked through
 * sooner than a name is hashed.
 */
static PyObject *
wanted_name(Door *door, PyObject *header)
{
    Py_ssize_t length = PyBytes_GET_SIZE(header);
    if (!(door->lengths >> (length & 63) & 1))
        return NULL;
    for (int i = 0; i < door->named; i++)
        if (PyBytes_GET_SIZE(door->names[i][0]) == length
            && memcmp(PyBytes_AS_STRING(door->names[i][0]), PyBytes_AS_STRING(header), length) == 0)
            return door->names[i][1];
    return NULL;
}

/* The value of a header as text, new reference: nearly all are ASCII. */
static PyObject *
as_text(const char *value, Py_ssize_t length)
{
    uint64_t high = 0, word;
    Py_ssize_t i = 0;
    for (; i + 8 <= length; i += 8) {
        memcpy(&word, value + i, 8);
        high |= word;
    }
    for (; i < length; i++)
        high |= (unsigned char)value[i];
    if (length < 2 || high & 0x8080808080808080u)
        return PyUnicode_DecodeLatin1(value, length, NULL);
    PyObject *text = PyUnicode_New(length, 127);
    if (text != NULL)
        memcpy(PyUnicode_1BYTE_DATA(text), value, length);
    return text;
}

/* The header of a pair goes into *found if it is wanted: 1. 0: it takes a closer look; or -1. */
static int
collected(Door *door, PyObject *pair, Wanted *found)
{
    if (!PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2)
        return 0;
    PyObject *header = PyTuple_GET_ITEM(pair, 0), *value = PyTuple_GET_ITEM(pair, 1);
    if (!PyBytes_CheckExact(header))
        return 0;
    PyObject *name = wanted_name(door, header), *key = door->core->key_header;
    if (name == NULL)
        return 1;
    PyObject **place = name == key                                          ? &found->key
                       : key != Py_None && name == names.authorization ? &found->authorization
                                                                            : NULL;
    int twice = place != NULL           ? *place != NULL
                : found->others != NULL ? PyDict_Contains(found->others, name)
                                        : 0;
    if (twice || !PyBytes_CheckExact(value))
        return twice < 0 ? -1 : 0;
    PyObject *text = as_text(PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value));
    if (place != NULL) {
        *place = text;
        return text == NULL ? -1 : 1;
    }
    int failed = text == NULL || (found->others == NULL && (found->others = PyDict_New()) == NULL)
                 || PyDict_SetItem(found->others, name, text) < 0;
    Py_XDECREF(text);
    return failed ? -1 : 1;
}

/* As open_exchange takes them: a dict, None, or the pair that Exchange.credentials is; new reference. */
static PyObject *
as_headers(Door *door, Wanted *found)
{
    if (found->others == NULL && found->key == NULL && found->authorization == NULL)
        Py_RETURN_NONE;
    if (found->others == NULL && door->core->resolve == Py_None)
        return pair_of(found->key == NULL ? names.empty : found->key,
                            found->authorization == NULL ? names.empty : found->authorization);
    PyObject *all = found->others == NULL ? PyDict_New() : Py_NewRef(found->others);
    if (all == NULL
        || (found->key != NULL && PyDict_SetItem(all, door->core->key_header, found->key) < 0)
        || (found->authorization != NULL
            && PyDict_SetItem(all, names.authorization, found->authorization) < 0))
        Py_CLEAR(all);
    return all;
}

/* The wanted request headers as open_exchange takes them; new reference. */
static PyObject *
wanted_headers(Edge *edge, Door *door, PyObject *pairs)
{
    Wanted found = {NULL, NULL, NULL};
    int plain = door->named >= 0 && (PyList_CheckExact(pairs) || PyTuple_CheckExact(pairs));
    for (Py_ssize_t i = 0; plain > 0 && i < PySequence_Fast_GET_SIZE(pairs); i++) {
        PyObject *pair = Py_NewRef(PySequence_Fast_ITEMS(pairs)[i]);
        plain = collected(door, pair, &found);
        Py_DECREF(pair);
    }
    PyObject *usual = plain > 0 ? as_headers(door, &found) : NULL;
    Py_XDECREF(found.key);
    Py_XDECREF(found.authorization);
    Py_XDECREF(found.others);
    if (plain)
        return usual;
    PyObject *headers = PyObject_CallFunctionObjArgs(edge->collect, door->wanted, pairs, NULL);
    if (headers != NULL && PyDict_CheckExact(headers) && PyDict_GET_SIZE(headers) == 0) {
        Py_DECREF(headers);
        Py_RETURN_NONE;
    }
    return headers;
}

/* As below of opsguard.http; new reference. */
static PyObject *
below(PyObject *path, PyObject *root)
{
    if (root == NULL || !PyUnicode_Check(root) || !PyUnicode_GET_LENGTH(root) || !PyUnicode_Check(path))
        return Py_NewRef(path);
    Py_ssize_t length = PyUnicode_GET_LENGTH(root), all = PyUnicode_GET_LENGTH(path);
    Py_ssize_t there = PyUnicode_Tailmatch(path, root, 0, all, -1);
    if (there > 0)
        there = all == length || PyUnicode_READ_CHAR(path, length) == '/';
    return there < 0 ? NULL : there ? PyUnicode_Substring(path, length, all) : Py_NewRef(path);
}

/* The address in a scope's `client`, or None; new reference. */
static PyObject *
peer_of(PyObject *client)
{
    if (client != NULL && PyTuple_CheckExact(client) && PyTuple_GET_SIZE(client) > 0
        && is_ascii(PyTuple_GET_ITEM(client, 0)) && PyUnicode_GET_LENGTH(PyTuple_GET_ITEM(client, 0)))
        return Py_NewRef(PyTuple_GET_ITEM(client, 0));
    int there = client == NULL ? 0 : PyObject_IsTrue(client);
    PyObject *peer = there > 0 ? PySequence_GetItem(client, 0) : there < 0 ? NULL : Py_NewRef(Py_None);
    there = peer == NULL ? -1 : PyObject_IsTrue(peer);
    if (there == 0)
        Py_SETREF(peer, Py_NewRef(Py_None));
    else if (there < 0)
        Py_CLEAR(peer);
    return peer;
}

/* Whether a request that names no length may have a body: HTTP/2 has no Transfer-Encoding. */
static int
unsaid_upload(PyObject *scope, PyObject *method)
{
    if (PyUnicode_Check(method) && PyUnicode_GET_LENGTH(method) == 3 && PyUnicode_READ_CHAR(method, 0) == 'G')
        return 0;
    PyObject *version = PyDict_GetItemWithError(scope, names.http_version);
    if (version == NULL)
        PyErr_Clear();
    return version != NULL && PyUnicode_Check(version) && PyUnicode_GET_LENGTH(version)
           && PyUnicode_READ_CHAR(version, 0) >= '2';
}

/* As open_exchange of opsguard_asgi.types, of a scope that is a dict; new reference. */
static Exchange *
open_scope(Edge *edge, Door *door, PyObject *scope)
{
    /* In a loop, for the sake of the cache: see ONE_COPY. */
    enum { METHOD, HEADERS, PATH, ROOT, CLIENT, FOUND };
    PyObject *keys[FOUND] = {names.method, names.headers, names.path, names.root_path, names.client};
    PyObject *found[FOUND] = {NULL}, *headers = NULL, *routed = NULL, *peer = NULL;
    Exchange *x = NULL;
    int failed = 0;
    for (int i = 0; i < FOUND && !failed; i++) {
        found[i] = Py_XNewRef(PyDict_GetItemWithError(scope, keys[i]));
        if (found[i] == NULL && i <= PATH && !PyErr_Occurred())
            PyErr_SetObject(PyExc_KeyError, keys[i]);
        failed = found[i] == NULL && PyErr_Occurred();
    }
    if (!failed && (headers = wanted_headers(edge, door, found[HEADERS])) != NULL
        && (routed = below(found[PATH], found[ROOT])) != NULL && (peer = peer_of(found[CLIENT])) != NULL)
        x = open_exchange(door, found[METHOD], found[PATH], routed, peer, headers, scope);
    if (x != NULL && !x->uploads && unsaid_upload(scope, found[METHOD]))
        x->uploads = 1;
    if (x != NULL && PyDict_SetItem(scope, edge->key, (PyObject *)x) < 0)
        Py_CLEAR(x);
    Py_XDECREF(headers);
    Py_XDECREF(routed);
    Py_XDECREF(peer);
    clear_objects(found, found + FOUND - 1);
    return x;
}

static Watch *
watch_new(Edge *edge, PyObject *send)
{
    Watch *self = PyObject_GC_New(Watch, &WatchType);
    if (self == NULL)
        return NULL;
    self->inner = self->scope = self->receive = self->respond = self->message = self->error = NULL;
    self->exchange = NULL;
    self->edge = (Edge *)Py_XNewRef(edge);
    self->send = Py_NewRef(send);
    self->state = NEW;
    self->running = 0;
    return self;
}

/* Respond */

static PyObject *
start_answer(Respond *self, PyObject *message)
{
    Exchange *x = self->exchange;
    if (self->edge->label != Py_None && !is_set(x->endpoint)
        && name_by(x->core, x, self->edge->label, self->scope) < 0)
        return NULL;
    PyObject *answer = NULL, *ours = NULL, *headers = NULL, *sent = NULL;
    PyObject *status = needed(message, names.status);
    if (status == NULL)
        return NULL;
    headers = item(message, names.headers);
    if (headers == NULL && (PyErr_Occurred() || (headers = PyTuple_New(0)) == NULL))
        goto done;
    ours = head(self->door, x, status, headers);
    if (ours == NULL)
        goto done;
    if (PyDict_CheckExact(message))
        answer = PyDict_Copy(message);
    else if ((answer = PyDict_New()) != NULL && PyDict_Update(answer, message) < 0)
        Py_CLEAR(answer);
    if (answer != NULL && PyDict_SetItem(answer, names.headers, ours) == 0)
        sent = call_one(self->send, answer);
done:
    Py_DECREF(status);
    Py_XDECREF(headers);
    Py_XDECREF(ours);
    Py_XDECREF(answer);
    return sent;
}

static PyObject *
last_message(Respond *self, PyObject *message)
{
    Watch *last = watch_new(NULL, self->send);
    if (last == NULL)
        return NULL;
    last->exchange = (Exchange *)Py_NewRef(self->exchange);
    last->message = Py_NewRef(message);
    PyObject_GC_Track(last);
    return (PyObject *)last;
}

static PyObject *
send_body(Respond *self, PyObject *message)
{
    PyObject *body = item(message, names.body);
    if (body != NULL) {
        Py_ssize_t size = length_of(body);
        Py_DECREF(body);
        if (size < 0)
            return NULL;
        self->exchange->sent += size;
    } else if (PyErr_Occurred())
        return NULL;
    PyObject *more = item(message, names.more_body);
    if (more == NULL && PyErr_Occurred())
        return NULL;
    int goes_on = more == NULL ? 0 : PyObject_IsTrue(more);
    Py_XDECREF(more);
    if (goes_on < 0)
        return NULL;
    return goes_on ? call_one(self->send, message) : last_message(self, message);
}

/* http.response.pathsend: the server sends a file by itself, and that is all of the body. */
static PyObject *
send_path(Respond *self, PyObject *message)
{
    PyObject *path = item(message, names.path), *encoded = NULL;
    struct stat found;
    if (path == NULL && PyErr_Occurred())
        return NULL;
    if (path != NULL && PyUnicode_FSConverter(path, &encoded)) {
        int failed;
        Py_BEGIN_ALLOW_THREADS
        failed = stat(PyBytes_AS_STRING(encoded), &found);
        Py_END_ALLOW_THREADS
        if (!failed)
            self->exchange->sent += found.st_size;
        Py_DECREF(encoded);
    }
    Py_XDECREF(path);
    PyErr_Clear(); /* an odd path is for the server to refuse */
    return last_message(self, message);
}

static PyObject *
respond_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Respond *self = (Respond *)callable;
    if (PyVectorcall_NARGS(flags) + (keywords == NULL ? 0 : PyTuple_GET_SIZE(keywords)) != 1) {
        PyErr_SetString(PyExc_TypeError, "send() takes one argument, the message");
        return NULL;
    }
    PyObject *message = args[0];
    PyObject *kind = needed(message, names.type);
    if (kind == NULL)
        return NULL;
    int found;
    PyObject *(*how)(Respond *, PyObject *) = NULL;
    if ((found = same(kind, names.body_kind)) > 0)
        how = send_body;
    else if (found == 0 && (found = same(kind, names.start)) > 0)
        how = start_answer;
    else if (found == 0 && (found = same(kind, names.pathsend)) > 0)
        how = send_path;
    Py_DECREF(kind);
    if (found < 0)
        return NULL;
    return how == NULL ? call_one(self->send, message) : how(self, message);
}

COLLECTED(respond, Respond, edge, send)

static PyTypeObject RespondType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Respond",
    .tp_basicsize = sizeof(Respond),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL
                | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Respond, call),
    .tp_dealloc = (destructor)respond_dealloc,
    .tp_traverse = (traverseproc)respond_traverse,
    .tp_clear = (inquiry)respond_clear,
};

/* Watch */

/* The request is opened, and the app, or our own answer, called: what to await; new reference.
 * If it could not be opened, the app goes on without us.
 */
static PyObject *
call_app(Watch *self, Door *door)
{
    Edge *edge = self->edge;
    Exchange *x = open_scope(edge, door, self->scope);
    if (x == NULL) {
        if (reported(door->core, names.site_open) < 0)
            return NULL;
        PyObject *args[] = {self->scope, self->receive, self->send};
        return PyObject_Vectorcall(edge->app, args, 3, NULL);
    }
    self->exchange = x;
    Respond *respond = PyObject_GC_New(Respond, &RespondType);
    if (respond == NULL)
        return NULL;
    respond->call = respond_call;
    respond->edge = (Edge *)Py_NewRef(edge);
    respond->door = (Door *)Py_NewRef(door);
    respond->exchange = (Exchange *)Py_NewRef(x);
    respond->scope = Py_NewRef(self->scope);
    respond->send = Py_NewRef(self->send);
    PyObject_GC_Track(respond);
    self->respond = (PyObject *)respond;
    if (edge->endpoint != Py_None && enter_by(x->core, x, edge->endpoint, self->scope) < 0)
        return NULL;
    if (is_set(x->work) || is_set(x->reply)) {
        PyObject *args[] = {(PyObject *)x, self->scope, self->receive, self->respond};
        return PyObject_Vectorcall(edge->reply, args, 4, NULL);
    }
    PyObject *heard = self->receive;
    if (x->uploads) {
        heard = PyObject_CallFunctionObjArgs(edge->observed, (PyObject *)x, heard, NULL);
        if (heard == NULL)
            return NULL;
    } else
        Py_INCREF(heard);
    PyObject *args[] = {self->scope, heard, self->respond};
    PyObject *awaitable = PyObject_Vectorcall(edge->app, args, 3, NULL);
    Py_DECREF(heard);
    return awaitable;
}

/* As alone() of opsguard_asgi.edge; -1 with an exception. A server's requests all have `send` from one
 * type, so it is asked once.
 */
static int
is_alone(Edge *edge, PyObject *send)
{
    PyObject *type = PyMethod_Check(send) ? (PyObject *)Py_TYPE(PyMethod_GET_SELF(send)) : NULL;
    if (type == NULL || type == edge->sender)
        return type != NULL && edge->sender_alone;
    PyObject *said = call_one(edge->alone, send);
    int alone = said == NULL ? -1 : said == Py_True;
    Py_XDECREF(said);
    if (alone >= 0) {
        edge->sender_alone = alone; /* first: a finalizer may run when the other type goes */
        put(&edge->sender, type);
    }
    return alone;
}

/* Whatever happened, this is over: as the `finally` blocks. 0, or -1 if that failed too. */
static int
leave(Watch *self)
{
    Exchange *x = self->exchange;
    Core *core = x == NULL ? NULL : x->core;
    self->state = DONE;
    if (core == NULL)
        return 0;
    PyObject *error = take_error();
    int failed;
    if (self->edge == NULL) {
        if (error != NULL && PyErr_GivenExceptionMatches(error, PyExc_OSError))
            x->left = 1;
        failed = finish_exchange(core, x);
    } else {
        failed = x->closed ? 0 : close_exchange(core, x);
        int alone = failed ? 1 : is_alone(self->edge, self->send);
        if (alone < 0 || (alone == 0 && set_back(core, x) < 0))
            failed = -1;
        Py_CLEAR(x->outer); /* what a framework keeps of this one keeps no other */
    }
    if (failed < 0) {
        Py_XDECREF(error);
        return -1;
    }
    give_error(error);
    return 0;
}

/* The app raised: await `_failed`, which says True if it has answered for that. */
static PySendResult
begin_failed(Watch *self, PyObject **result)
{
    Py_CLEAR(self->inner);
    self->error = take_error();
    self->inner = driven(PyObject_CallFunctionObjArgs(self->edge->failed, (PyObject *)self->exchange,
                                                      self->error, self->send, self->respond, NULL));
    return self->inner == NULL ? PYGEN_ERROR : PyIter_Send(self->inner, Py_None, result);
}

/* What the inner awaitable gave, and what comes of it. Always finishes with None, or with what the
 * app raised, if `_failed` has not answered for it.
 */
static PySendResult
settle(Watch *self, PySendResult got, PyObject **result)
{
    if (got == PYGEN_ERROR && self->error == NULL && self->respond != NULL)
        got = begin_failed(self, result);
    if (got == PYGEN_NEXT)
        return got;
    Py_CLEAR(self->inner);
    PyObject *error = self->error;
    self->error = NULL;
    int answered = got == PYGEN_RETURN && *result == Py_True;
    if (got == PYGEN_RETURN)
        Py_CLEAR(*result);
    if (error != NULL && !answered) {
        go_on_with(error); /* as the context of what `_failed` raised, if it did */
        leave(self);
        return PYGEN_ERROR;
    }
    Py_XDECREF(error);
    if (leave(self) < 0)
        got = PYGEN_ERROR;
    if (got == PYGEN_RETURN)
        *result = Py_NewRef(Py_None);
    return got;
}

static PySendResult
watch_send(Watch *self, PyObject *value, PyObject **result)
{
    PySendResult got;
    *result = NULL;
    if (self->running) {
        PyErr_SetString(PyExc_ValueError, "coroutine already executing");
        return PYGEN_ERROR;
    }
    if (self->state == DONE) {
        PyErr_SetString(PyExc_RuntimeError, "cannot reuse already awaited coroutine");
        return PYGEN_ERROR;
    }
    self->running = 1;
    if (self->state == NEW) {
        PyObject *awaitable = NULL;
        self->state = BEGUN;
        if (value != Py_None)
            PyErr_SetString(PyExc_TypeError, "can't send non-None value to a just-started coroutine");
        else if (self->edge == NULL)
            awaitable = call_one(self->send, self->message);
        else {
            PyObject *door = Py_XNewRef(self->edge->port->held);
            if (door != NULL && Py_IS_TYPE(door, &DoorType))
                awaitable = call_app(self, (Door *)door);
            else
                PyErr_SetString(PyExc_TypeError, "a port's door is needed");
            Py_XDECREF(door);
        }
        self->inner = driven(awaitable);
    }
    got = self->inner == NULL ? PYGEN_ERROR : PyIter_Send(self->inner, value, result);
    if (got != PYGEN_NEXT)
        got = settle(self, got, result);
    self->running = 0;
    return got;
}

static PyObject *
watch_next(Watch *self)
{
    PyObject *result;
    if (watch_send(self, Py_None, &result) == PYGEN_RETURN)
        Py_CLEAR(result); /* NULL without an exception is StopIteration(None) */
    return result;
}

/* As watch_next, for callers in Python. */
static PyObject *
finished(PySendResult got, PyObject *result)
{
    if (got != PYGEN_RETURN)
        return result;
    Py_DECREF(result);
    PyErr_SetNone(PyExc_StopIteration);
    return NULL;
}

static PyObject *
watch_send_method(Watch *self, PyObject *value)
{
    PyObject *result;
    PySendResult got = watch_send(self, value, &result);
    return finished(got, result);
}

static int
raise_given(PyObject *const *args, Py_ssize_t count)
{
    PyObject *type = args[0], *value = count > 1 ? args[1] : NULL, *trace = count > 2 ? args[2] : NULL;
    if (trace == Py_None)
        trace = NULL;
    if (trace != NULL && !PyTraceBack_Check(trace)) {
        PyErr_SetString(PyExc_TypeError, "throw() third argument must be a traceback object");
        return -1;
    }
    if (PyExceptionInstance_Check(type)) {
        value = type;
        type = (PyObject *)Py_TYPE(value);
        if (trace == NULL) {
            PyErr_Restore(Py_NewRef(type), Py_NewRef(value), PyException_GetTraceback(value));
            return 0;
        }
    } else if (!PyExceptionClass_Check(type)) {
        PyErr_SetString(PyExc_TypeError, "exceptions must be classes or instances deriving from "
                                         "BaseException");
        return -1;
    }
    PyErr_Restore(Py_NewRef(type), Py_XNewRef(value), Py_XNewRef(trace));
    return 0;
}

/* Throw into what is awaited. */
static PySendResult
pass_on(Watch *self, PyObject *const *args, Py_ssize_t count, PyObject **result)
{
    PyObject *leaving = PyErr_GivenExceptionMatches(args[0], PyExc_GeneratorExit) ? names.close
                                                                                    : names.throw;
    PyObject *method = PyObject_GetAttr(self->inner, leaving);
    if (method == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError))
            return PYGEN_ERROR;
        PyErr_Clear();
        raise_given(args, count);
        return PYGEN_ERROR;
    }
    if (leaving == names.close) {
        PyObject *closed = PyObject_CallNoArgs(method);
        Py_DECREF(method);
        if (closed == NULL)
            return PYGEN_ERROR;
        Py_DECREF(closed);
        raise_given(args, count);
        return PYGEN_ERROR;
    }
    *result = PyObject_Vectorcall(method, args, count, NULL);
    Py_DECREF(method);
    if (*result != NULL)
        return PYGEN_NEXT;
    if (!PyErr_ExceptionMatches(PyExc_StopIteration))
        return PYGEN_ERROR;
    PyObject *stop = take_error(), *value = ((PyStopIterationObject *)stop)->value;
    *result = Py_NewRef(value == NULL ? Py_None : value);
    Py_DECREF(stop);
    return PYGEN_RETURN;
}

static PyObject *
watch_throw(Watch *self, PyObject *const *args, Py_ssize_t count)
{
    if (count < 1 || count > 3) {
        PyErr_SetString(PyExc_TypeError, "throw() takes one to three arguments");
        return NULL;
    }
    if (self->running) {
        PyErr_SetString(PyExc_ValueError, "coroutine already executing");
        return NULL;
    }
    if (self->state == DONE) {
        PyErr_SetString(PyExc_RuntimeError, "cannot reuse already awaited coroutine");
        return NULL;
    }
    if (self->state == NEW) {
        self->state = DONE;
        raise_given(args, count);
        return NULL;
    }
    PyObject *result = NULL;
    self->running = 1;
    PySendResult got = settle(self, pass_on(self, args, count, &result), &result);
    self->running = 0;
    return finished(got, result);
}

static PyObject *
watch_close(Watch *self, PyObject *Py_UNUSED(nothing))
{
    if (self->state != BEGUN || self->running) {
        if (self->running) {
            PyErr_SetString(PyExc_ValueError, "coroutine already executing");
            return NULL;
        }
        self->state = DONE;
        Py_RETURN_NONE;
    }
    PyObject *args[] = {PyExc_GeneratorExit};
    PyObject *result = watch_throw(self, args, 1);
    if (result != NULL) {
        Py_DECREF(result);
        PyErr_SetString(PyExc_RuntimeError, "coroutine ignored GeneratorExit");
        return NULL;
    }
    if (!PyErr_ExceptionMatches(PyExc_GeneratorExit) && !PyErr_ExceptionMatches(PyExc_StopIteration))
        return NULL;
    PyErr_Clear();
    Py_RETURN_NONE;
}

static PyObject *
watch_await(PyObject *self)
{
    return Py_NewRef(self);
}

static void
watch_finalize(PyObject *object)
{
    Watch *self = (Watch *)object;
    if (self->state != BEGUN || self->running)
        return;
    PyObject *error = take_error();
    PyObject *done = watch_close(self, NULL);
    if (done == NULL)
        PyErr_WriteUnraisable(object);
    Py_XDECREF(done);
    give_error(error);
}

HOLDING(watch, Watch, inner, error)

static void
watch_dealloc(Watch *self)
{
    if (self->state == BEGUN && PyObject_CallFinalizerFromDealloc((PyObject *)self) < 0)
        return;
    PyObject_GC_UnTrack(self);
    watch_clear(self);
    PyObject_GC_Del(self);
}

static PyMethodDef watch_methods[] = {
    {"send", (PyCFunction)watch_send_method, METH_O, NULL},
    {"throw", (PyCFunction)(void (*)(void))watch_throw, METH_FASTCALL, NULL},
    {"close", (PyCFunction)watch_close, METH_NOARGS, NULL},
    {NULL},
};

/* What `inspect` and event loops ask a coroutine for: without these, a library that insists on one
 * takes no request for a task. There is no frame, so one that is not begun has the state of a closed
 * one, which is as well not to be cancelled.
 */

static PyObject *
watch_class(PyObject *Py_UNUSED(self), void *Py_UNUSED(unused))
{
    return Py_NewRef(&PyCoro_Type);
}

static PyObject *
watch_name(PyObject *Py_UNUSED(self), void *Py_UNUSED(unused))
{
    return PyUnicode_FromString("opsguard");
}

static PyObject *
watch_frame(PyObject *Py_UNUSED(self), void *Py_UNUSED(unused))
{
    Py_RETURN_NONE;
}

static PyObject *
watch_running(Watch *self, void *Py_UNUSED(unused))
{
    return PyBool_FromLong(self->running);
}

static PyObject *
watch_suspended(Watch *self, void *Py_UNUSED(unused))
{
    return PyBool_FromLong(self->state == BEGUN && !self->running);
}

static PyGetSetDef watch_attributes[] = {
    {"__class__", watch_class},
    {"__name__", watch_name},
    {"__qualname__", watch_name},
    {"cr_frame", watch_frame},
    {"cr_running", (getter)watch_running},
    {"cr_suspended", (getter)watch_suspended},
    {NULL},
};

static PyMemberDef watch_members[] = {
    {"cr_await", T_OBJECT, offsetof(Watch, inner), READONLY, NULL},
    {NULL},
};

static PyAsyncMethods watch_async = {.am_await = watch_await, .am_send = (sendfunc)watch_send};

static PyTypeObject WatchType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Watch",
    .tp_basicsize = sizeof(Watch),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_as_async = &watch_async,
    .tp_iter = PyObject_SelfIter, /* for `yield from call.__await__()` */
    .tp_iternext = (iternextfunc)watch_next,
    .tp_finalize = watch_finalize,
    .tp_dealloc = (destructor)watch_dealloc,
    .tp_traverse = (traverseproc)watch_traverse,
    .tp_clear = (inquiry)watch_clear,
    .tp_methods = watch_methods,
    .tp_getset = watch_attributes,
    .tp_members = watch_members,
};

/* Edge */

static PyObject *
edge_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Edge *self = (Edge *)callable;
    if (PyVectorcall_NARGS(flags) != 3 || keywords != NULL || !PyDict_CheckExact(args[0]))
        return PyObject_Vectorcall(self->http, args, flags, keywords);
    PyObject *scope = args[0];
    PyObject *kind = item(scope, names.type);
    if (kind == NULL && PyErr_Occurred())
        return NULL;
    int usual = kind == NULL ? 0 : same(kind, names.http);
    Py_XDECREF(kind);
    int nested = usual <= 0 ? 0 : PyDict_Contains(scope, self->key);
    if (usual < 0 || nested < 0)
        return NULL;
    if (!usual || nested)
        return PyObject_Vectorcall(self->http, args, flags, keywords);
    Watch *watch = watch_new(self, args[2]);
    if (watch == NULL)
        return NULL;
    watch->scope = Py_NewRef(scope);
    watch->receive = Py_NewRef(args[1]);
    PyObject_GC_Track(watch);
    return (PyObject *)watch;
}

static PyObject *
edge_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"app",   "port",  "http",   "key",      "endpoint",
                           "label", "reply", "failed", "observed", "collect", "alone", NULL};
    PyObject *app, *port, *http, *key, *endpoint, *label, *reply, *failed, *observed, *collect, *alone;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OO!OUOOOOOOO", keys, &app, &HingeType, &port,
                                     &http, &key, &endpoint, &label, &reply, &failed, &observed,
                                     &collect, &alone))
        return NULL;
    Edge *self = (Edge *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->call = edge_call;
    EDGE_OBJECTS(KEEP)
    return (PyObject *)self;
}

COLLECTED(edge, Edge, port, sender)

static PyMemberDef edge_members[] = {
    {"app", T_OBJECT_EX, offsetof(Edge, app), READONLY, NULL},
    {NULL},
};

static PyTypeObject EdgeType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Edge",
    .tp_basicsize = sizeof(Edge),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = edge_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Edge, call),
    .tp_dealloc = (destructor)edge_dealloc,
    .tp_traverse = (traverseproc)edge_traverse,
    .tp_clear = (inquiry)edge_clear,
    .tp_members = edge_members,
};
