/* Hook: the `handle` of a Starlette route, as opsguard_fastapi.routes. */

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *handle, *hooked, *methods, *template, *endpoint, *key, *prefix, *refuse;
    PyObject *hooks; /* the route, set from outside */
} Hook;

#define HOOK_OBJECTS(X) \
    X(handle) X(hooked) X(methods) X(template) X(endpoint) X(key) X(prefix) X(refuse)

static PyObject *
hook_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Hook *self = (Hook *)callable;
    if (PyVectorcall_NARGS(flags) != 3 || keywords != NULL || !PyDict_CheckExact(args[0]))
        return PyObject_Vectorcall(self->hooked, args, flags, keywords);
    PyObject *scope = args[0];
    PyObject *found = PyDict_GetItemWithError(scope, self->key);
    if (found == NULL && PyErr_Occurred())
        return NULL;
    Exchange *x = (Exchange *)found;
    if (found == NULL || !PyObject_TypeCheck(found, &ExchangeType) || x->core == NULL
        || x->method == NULL || is_set(x->endpoint) || x->closed)
        return PyObject_Vectorcall(self->hooked, args, flags, keywords);
    Py_INCREF(x);
    int unusual = PyDict_Contains(scope, self->prefix);
    if (unusual == 0)
        unusual = PyDict_Contains(scope, names.fastapi);
    if (unusual == 0 && self->methods != Py_None) {
        PyObject *method = PyDict_GetItemWithError(scope, names.method);
        int allowed = method != NULL ? PySet_Contains(self->methods, method) : PyErr_Occurred() ? -1 : 0;
        unusual = allowed < 0 ? -1 : !allowed;
    }
    if (unusual) {
        Py_DECREF(x);
        return unusual < 0 ? NULL : PyObject_Vectorcall(self->hooked, args, flags, keywords);
    }
    put(&x->endpoint, self->template);
    put(&x->marked, self->endpoint);
    PyObject *reply = enter(x->core, x);
    Py_DECREF(x);
    if (reply == NULL)
        return NULL;
    PyObject *result;
    if (reply == Py_None)
        result = PyObject_Vectorcall(self->handle, args, flags, NULL);
    else
        result = PyObject_CallFunctionObjArgs(self->refuse, reply, self->handle, scope, args[1], args[2],
                                              NULL);
    Py_DECREF(reply);
    return result;
}

static PyObject *
hook_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"handle", "hooked", "methods", "template", "endpoint", "key",
                           "prefix", "refuse", NULL};
    PyObject *handle, *hooked, *methods, *template, *endpoint, *key, *prefix, *refuse;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OOOUOUUO", keys, &handle, &hooked, &methods,
                                     &template, &endpoint, &key, &prefix, &refuse))
        return NULL;
    if (methods != Py_None && !PyAnySet_Check(methods)) {
        PyErr_SetString(PyExc_TypeError, "methods are a set or None");
        return NULL;
    }
    Hook *self = (Hook *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->call = hook_call;
    HOOK_OBJECTS(KEEP)
    return (PyObject *)self;
}

COLLECTED(hook, Hook, handle, hooks)

static PyMemberDef hook_members[] = {
    {"hooks", T_OBJECT_EX, offsetof(Hook, hooks), 0, NULL},
    {NULL},
};

static PyTypeObject HookType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Hook",
    .tp_basicsize = sizeof(Hook),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = hook_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Hook, call),
    .tp_dealloc = (destructor)hook_dealloc,
    .tp_traverse = (traverseproc)hook_traverse,
    .tp_clear = (inquiry)hook_clear,
    .tp_members = hook_members,
};
