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

/* Whether two texts of ASCII are the same; for short ones, of which most differ in length. */
static int
same_ascii(PyObject *text, PyObject *other)
{
    Py_ssize_t left = PyUnicode_GET_LENGTH(text);
    if (left != PyUnicode_GET_LENGTH(other))
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
    if (text == other)
        return 1;
    return is_ascii(text) && is_ascii(other) ? same_ascii(text, other)
                                             : PyObject_RichCompareBool(text, other, Py_EQ);
}
