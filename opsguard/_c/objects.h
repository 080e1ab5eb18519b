/* What `_speed.c` needs of exceptions, mappings, attributes and texts. */

/* Set it again; takes the reference. NULL: none. */
static void
give_error(PyObject *error)
{
    if (error == NULL)
        return;
#if PY_VERSION_HEX >= 0x030C0000
    PyErr_SetRaisedException(error);
#else
    PyErr_Restore(Py_NewRef(Py_TYPE(error)), error, PyException_GetTraceback(error));
#endif
}

/* The end of the chain of contexts, borrowed; of one that is a ring, any. */
static PyObject *
oldest(PyObject *error)
{
    PyObject *context;
    for (int i = 0; i < 1000 && (context = PyException_GetContext(error)) != NULL; i++) {
        Py_DECREF(context); /* the one before holds it */
        error = context;
    }
    return error;
}

/* Set it again, or, where another one was raised meanwhile, leave it as the context of that, as an
 * `except` block does. Takes the reference.
 */
static void
go_on_with(PyObject *error)
{
    PyObject *newer = take_error();
    if (newer == NULL) {
        give_error(error);
        return;
    }
    PyObject *last = oldest(newer);
    if (last != oldest(error)) /* else they have met already, and would make a ring */
        PyException_SetContext(last, Py_NewRef(error));
    Py_DECREF(error);
    give_error(newer);
}

/* mapping[key], new reference; NULL without an exception if there is none. */
static PyObject *
item(PyObject *mapping, PyObject *key)
{
    PyObject *found;
    if (PyDict_CheckExact(mapping)) {
        found = PyDict_GetItemWithError(mapping, key);
        return Py_XNewRef(found);
    }
    found = PyObject_GetItem(mapping, key);
    if (found == NULL && PyErr_ExceptionMatches(PyExc_KeyError))
        PyErr_Clear();
    return found;
}

/* As `item`, but what is not there is a KeyError. */
static PyObject *
needed(PyObject *mapping, PyObject *key)
{
    PyObject *found = item(mapping, key);
    if (found == NULL && !PyErr_Occurred())
        PyErr_SetObject(PyExc_KeyError, key);
    return found;
}

/* An attribute that need not be there: 1 and a new reference, 0, or -1 with an exception. */
static inline int
optional(PyObject *object, PyObject *name, PyObject **found)
{
#if PY_VERSION_HEX >= 0x030D0000
    return PyObject_GetOptionalAttr(object, name, found);
#else
    return _PyObject_LookupAttr(object, name, found);
#endif
}

static inline int
is_ascii(PyObject *object)
{
    return PyUnicode_CheckExact(object) && PyUnicode_IS_COMPACT_ASCII(object);
}

/* As `same`, for two texts that are not one object. */
ONE_COPY int
alike(PyObject *text, PyObject *other)
{
    if (!is_ascii(text) || !is_ascii(other))
        return PyObject_RichCompareBool(text, other, Py_EQ);
    Py_ssize_t left = PyUnicode_GET_LENGTH(text);
    if (left != PyUnicode_GET_LENGTH(other)) /* most that are not the same */
        return 0;
    const Py_UCS1 *a = PyUnicode_1BYTE_DATA(text), *b = PyUnicode_1BYTE_DATA(other);
    uint64_t word, with;
    for (; left >= 8; left -= 8, a += 8, b += 8) {
        memcpy(&word, a, 8);
        memcpy(&with, b, 8);
        if (word != with)
            return 0;
    }
    while (left-- > 0)
        if (*a++ != *b++)
            return 0;
    return 1;
}

/* text == other; -1 with an exception. */
static inline int
same(PyObject *text, PyObject *other)
{
    return text == other ? 1 : alike(text, other);
}

/* Calls for which Python has functions that nearly no other code calls, so that they are in no cache. */

/* callable(object) */
static inline PyObject *
call_one(PyObject *callable, PyObject *object)
{
    PyObject *args[] = {NULL, object}; /* the first is room for the self of a method */
    return PyObject_Vectorcall(callable, args + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
}

/* (first, second) */
static inline PyObject *
pair_of(PyObject *first, PyObject *second)
{
    PyObject *pair = PyTuple_New(2);
    if (pair != NULL) {
        PyTuple_SET_ITEM(pair, 0, Py_NewRef(first));
        PyTuple_SET_ITEM(pair, 1, Py_NewRef(second));
    }
    return pair;
}

/* len(data); -1 with an exception. */
static inline Py_ssize_t
length_of(PyObject *data)
{
    return PyBytes_CheckExact(data) ? PyBytes_GET_SIZE(data) : PyObject_Size(data);
}

/* What a type of ours holds -------------------------------------------------------------------------
 *
 * Its objects lie side by side, from one field to another, and are gone through by the same few
 * instructions for all types: code that is run once for a request is seldom in the cache.
 */

ONE_COPY int
visit_objects(PyObject **object, PyObject **last, visitproc visit, void *arg)
{
    for (; object <= last; object++)
        Py_VISIT(*object);
    return 0;
}

ONE_COPY int
clear_objects(PyObject **object, PyObject **last)
{
    for (; object <= last; object++)
        Py_CLEAR(*object);
    return 0;
}

/* tp_traverse and tp_clear of a type, whose fields from `first` to `last` are all its objects. */
#define HOLDING(name, Type, first, last) \
    static int name##_traverse(Type *self, visitproc visit, void *arg) \
    { \
        return visit_objects((PyObject **)&self->first, (PyObject **)&self->last, visit, arg); \
    } \
    static int name##_clear(Type *self) \
    { \
        return clear_objects((PyObject **)&self->first, (PyObject **)&self->last); \
    }

/* And tp_dealloc of one that needs no more. */
#define COLLECTED(name, Type, first, last) \
    HOLDING(name, Type, first, last) \
    static void name##_dealloc(Type *self) \
    { \
        PyObject_GC_UnTrack(self); \
        name##_clear(self); \
        Py_TYPE(self)->tp_free((PyObject *)self); \
    }

/* Keep what a constructor was given. */
#define KEEP(name) self->name = (void *)Py_NewRef(name);
