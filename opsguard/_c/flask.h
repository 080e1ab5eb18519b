/* Turn: the hook in Flask, as opsguard_flask. */

/* As `enter` of opsguard_flask, in the place of `preprocess_request`, which it goes on to. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *current, *slow, *preprocess, *template, *answer, *views, *root, *templates;
} Turn;

#define TURN_OBJECTS(X) X(current) X(slow) X(preprocess) X(template) X(answer) X(views) X(root)

/* Whether the app is where the server put it: nothing in between has moved SCRIPT_NAME, which a server
 * may leave out where it is empty (PEP 3333).
 */
static int
unmounted(Turn *self, PyObject *environ)
{
    PyObject *mounted = PyDict_GetItemWithError(environ, names.script_name), *root = NULL;
    if (mounted != NULL || !PyErr_Occurred())
        root = PyDict_GetItemWithError(environ, self->root);
    if (root == NULL)
        return PyErr_Occurred() ? -1 : 0;
    return mounted != NULL ? same(mounted, root) : is_ascii(root) && PyUnicode_GET_LENGTH(root) == 0;
}

/* What Flask has found: the template of the rule and its view, or nothing. 1, 0, or -1. */
static int
matched(Turn *self, PyObject *environ, PyObject **endpoint, PyObject **view)
{
    PyObject *request = PyDict_GetItemWithError(environ, names.request), *rule, *text, *name;
    if (request == NULL || optional(request, names.url_rule, &rule) <= 0)
        return PyErr_Occurred() ? -1 : 0;
    if (rule == Py_None) {
        Py_DECREF(rule);
        return 0;
    }
    text = PyObject_GetAttr(rule, names.rule);
    name = text == NULL ? NULL : PyObject_GetAttr(rule, names.rule_endpoint);
    Py_DECREF(rule);
    if (name != NULL && PyUnicode_CheckExact(text)) {
        PyObject *found = PyDict_GetItemWithError(self->views, name);
        if (found != NULL || !PyErr_Occurred()) {
            *view = Py_NewRef(found == NULL ? Py_None : found);
            *endpoint = known_template(self->templates, self->template, text);
        }
    }
    Py_XDECREF(text);
    Py_XDECREF(name);
    if (*endpoint != NULL && !PyErr_Occurred())
        return 1;
    Py_CLEAR(*endpoint);
    Py_CLEAR(*view);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *
turn_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Turn *self = (Turn *)callable;
    PyObject *found, *endpoint = NULL, *view = NULL;
    if (PyContextVar_Get(self->current, Py_None, &found) < 0)
        return NULL;
    Exchange *x = PyObject_TypeCheck(found, &ExchangeType) ? (Exchange *)found : NULL;
    int usual = x != NULL && x->core != NULL && !is_set(x->endpoint) && x->source != NULL
                && PyDict_CheckExact(x->source);
    PyObject *environ = usual ? Py_NewRef(x->source) : NULL;
    if (usual)
        usual = unmounted(self, environ);
    if (usual > 0)
        usual = matched(self, environ, &endpoint, &view);
    Py_XDECREF(environ);
    PyObject *reply = NULL;
    if (usual > 0) {
        PyObject *known[] = {endpoint, view};
        reply = exchange_enter(x, known, 2, NULL);
    }
    Py_XDECREF(endpoint);
    Py_XDECREF(view);
    Py_DECREF(found);
    if (usual <= 0)
        return usual < 0 ? NULL : PyObject_Vectorcall(self->slow, args, flags, keywords);
    if (reply == Py_None) {
        Py_DECREF(reply);
        return PyObject_Vectorcall(self->preprocess, args, flags, keywords);
    }
    if (reply == NULL)
        return NULL;
    PyObject *told = call_one(self->answer, reply);
    Py_DECREF(reply);
    if (told != Py_None)
        return told;
    Py_DECREF(told); /* it took a look outside, and the app is to answer */
    return PyObject_Vectorcall(self->preprocess, args, flags, keywords);
}

static PyObject *
turn_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"current", "slow", "preprocess", "template", "answer", "views", "root", NULL};
    PyObject *current, *slow, *preprocess, *template, *answer, *views, *root;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$O!OOOOO!U", keys, &PyContextVar_Type, &current,
                                     &slow, &preprocess, &template, &answer, &PyDict_Type, &views, &root))
        return NULL;
    Turn *self = (Turn *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->call = turn_call;
    TURN_OBJECTS(KEEP)
    if ((self->templates = PyDict_New()) == NULL)
        Py_CLEAR(self);
    return (PyObject *)self;
}

COLLECTED(turn, Turn, current, templates)

static PyTypeObject TurnType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "opsguard._speed.Turn",
    .tp_basicsize = sizeof(Turn),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = turn_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Turn, call),
    .tp_dealloc = (destructor)turn_dealloc,
    .tp_traverse = (traverseproc)turn_traverse,
    .tp_clear = (inquiry)turn_clear,
};
