/* The lines of many series at once, as `_lines` of `metrics.text`. */

enum { MOST_DIGITS = 40 }; /* of a number as text, the shortest that reads back the same, and its NUL */

/* A text that is made; of ASCII, and longer than what is in it so far. */
typedef struct {
    PyObject *text;
    Py_ssize_t length;
} Growing;

/* Where to write the next `size` characters at most; NULL with an exception. */
static char *
room(Growing *growing, Py_ssize_t size)
{
    Py_ssize_t has = PyUnicode_GET_LENGTH(growing->text);
    if (size > PY_SSIZE_T_MAX / 2 - growing->length) {
        PyErr_NoMemory();
        return NULL;
    }
    if (growing->length + size > has
        && PyUnicode_Resize(&growing->text, (growing->length + size) * 2) < 0)
        return NULL;
    return (char *)PyUnicode_1BYTE_DATA(growing->text) + growing->length;
}

/* A count as text. The end of it, or NULL: Python has to say what it is. */
static char *
write_count(char *at, double count)
{
    if (!(count >= 0.0 && count < 9007199254740992.0))
        return NULL;
    char digits[MOST_DIGITS], *first = digits + sizeof digits;
    unsigned long long left = (unsigned long long)count;
    do
        *--first = (char)('0' + left % 10);
    while (left /= 10);
    size_t length = (size_t)(digits + sizeof digits - first);
    memcpy(at, first, length);
    return at + length;
}

/* As `number`. The end of it, or NULL, with or without an exception. */
static char *
write_number(char *at, double value)
{
    if (value >= 0.0 && value < 1e15 && value == floor(value) && !signbit(value)) {
        at = write_count(at, value);
        memcpy(at, ".0", 2);
        return at + 2;
    }
    if (!isfinite(value))
        return NULL;
    char *made = PyOS_double_to_string(value, 'r', 0, Py_DTSF_ADD_DOT_0, NULL);
    if (made == NULL)
        return NULL;
    size_t length = strlen(made);
    if (length < MOST_DIGITS)
        memcpy(at, made, length);
    PyMem_Free(made);
    return length < MOST_DIGITS ? at + length : NULL;
}

/* As `escape`. */
static char *
write_escaped(char *at, PyObject *value)
{
    const char *from = (const char *)PyUnicode_1BYTE_DATA(value), *end = from + PyUnicode_GET_LENGTH(value);
    for (; from < end; from++) {
        if (*from == '"' || *from == '\\' || *from == '\n')
            *at++ = '\\';
        *at++ = *from == '\n' ? 'n' : *from;
    }
    return at;
}

static char *
write_pairs(char *at, PyObject *labels, PyObject *values)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(labels); i++) {
        PyObject *label = PyTuple_GET_ITEM(labels, i);
        if (i > 0)
            *at++ = ',';
        memcpy(at, PyUnicode_1BYTE_DATA(label), PyUnicode_GET_LENGTH(label));
        at += PyUnicode_GET_LENGTH(label);
        *at++ = '=';
        *at++ = '"';
        at = write_escaped(at, PyTuple_GET_ITEM(values, i));
        *at++ = '"';
    }
    return at;
}

/* The most characters of the pairs; -1: not all are ASCII, or not as many values as labels. */
static Py_ssize_t
size_of_pairs(PyObject *labels, PyObject *values)
{
    if (!PyTuple_CheckExact(values) || PyTuple_GET_SIZE(values) != PyTuple_GET_SIZE(labels))
        return -1;
    Py_ssize_t size = 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(labels); i++) {
        PyObject *label = PyTuple_GET_ITEM(labels, i), *value = PyTuple_GET_ITEM(values, i);
        if (!is_ascii(label) || !is_ascii(value))
            return -1;
        size += PyUnicode_GET_LENGTH(label) + 2 * PyUnicode_GET_LENGTH(value) + 4;
    }
    return size;
}

/* The numbers of a worker, which lie in memory, or of all, which are a list. */
typedef struct {
    Py_buffer memory;
    PyObject *list; /* borrowed; NULL: it is the memory */
    Py_ssize_t length;
} Cells;

/* 1. 0: they are something else; or -1. */
static int
open_cells(Cells *cells, PyObject *object)
{
    cells->memory.obj = NULL;
    cells->list = PyList_CheckExact(object) ? object : NULL;
    if (cells->list != NULL) {
        cells->length = PyList_GET_SIZE(object);
        return 1;
    }
    if (!PyObject_CheckBuffer(object))
        return 0;
    if (PyObject_GetBuffer(object, &cells->memory, PyBUF_CONTIG_RO | PyBUF_FORMAT) < 0)
        return -1;
    cells->length = cells->memory.len / (Py_ssize_t)sizeof(double);
    return cells->memory.format != NULL && strcmp(cells->memory.format, "d") == 0;
}

static inline void
close_cells(Cells *cells)
{
    if (cells->memory.obj != NULL)
        PyBuffer_Release(&cells->memory);
}

/* The number of a cell that there is. 1, or 0: it is no float. */
static inline int
cell_at(const Cells *cells, Py_ssize_t at, double *number)
{
    if (cells->list == NULL) {
        *number = ((const double *)cells->memory.buf)[at];
        return 1;
    }
    PyObject *found = PyList_GET_ITEM(cells->list, at);
    if (!PyFloat_CheckExact(found))
        return 0;
    *number = PyFloat_AS_DOUBLE(found);
    return 1;
}

/* What a series looks like. */
typedef struct {
    const char *form; /* %s for a number, NUL for the pairs of the labels */
    Py_ssize_t length, numbers, places;
    PyObject *labels;
    Py_ssize_t counts; /* cells that count; 0: the series is one number */
    int summed;        /* the last numbers are the count and the sum */
} Shape;

/* Add one series. 1. 0: it takes the function in Python; or -1. */
static int
add_series(Growing *growing, const Shape *shape, const Cells *cells, PyObject *values, Py_ssize_t first)
{
    Py_ssize_t size = size_of_pairs(shape->labels, values);
    if (size < 0 || size > PY_SSIZE_T_MAX / 4 / (shape->places + 1) || first < 0
        || first > cells->length - shape->counts - (shape->summed || !shape->counts))
        return 0;
    char *at = room(growing, shape->length + shape->places * size + shape->numbers * MOST_DIGITS);
    if (at == NULL)
        return -1;
    char *begin = at;
    const char *pairs = NULL, *end = shape->form + shape->length;
    Py_ssize_t pairs_length = 0, running = shape->counts ? shape->numbers - 2 * shape->summed : 0;
    Py_ssize_t number = 0, cell = first;
    double count = 0.0, value;
    for (const char *from = shape->form; from < end;) {
        const char *literal = from;
        while (from < end && *from != '\0' && *from != '%')
            from++;
        memcpy(at, literal, from - literal);
        at += from - literal;
        if (from == end)
            break;
        if (*from == '\0') {
            if (pairs == NULL) {
                pairs = at;
                at = write_pairs(at, shape->labels, values);
                pairs_length = at - pairs;
            }
            else {
                memcpy(at, pairs, pairs_length);
                at += pairs_length;
            }
            from++;
            continue;
        }
        from += 2;
        if (!shape->counts || number > running) { /* what it is, or its sum */
            if (!cell_at(cells, first + shape->counts, &value) || (at = write_number(at, value)) == NULL)
                return PyErr_Occurred() ? -1 : 0;
        }
        else {
            Py_ssize_t until = number < running ? first + number + 1 : first + shape->counts;
            for (; cell < until; cell++) {
                if (!cell_at(cells, cell, &value) || !(value >= 0.0))
                    return 0;
                count += floor(value); /* as int() */
            }
            if ((at = write_count(at, count)) == NULL)
                return 0;
        }
        number++;
    }
    growing->length += at - begin;
    return 1;
}

static int
shape_of(Shape *shape, PyObject *form, PyObject *labels)
{
    if (!is_ascii(form) || !PyTuple_CheckExact(labels))
        return 0;
    shape->form = (const char *)PyUnicode_1BYTE_DATA(form);
    shape->length = PyUnicode_GET_LENGTH(form);
    shape->labels = labels;
    shape->numbers = shape->places = 0;
    for (Py_ssize_t i = 0; i < shape->length; i++) {
        shape->places += shape->form[i] == '\0';
        if (shape->form[i] != '%')
            continue;
        shape->numbers++;
        if (shape->form[i + 1] != 's') /* there is a NUL behind its end */
            return 0;
    }
    return 1;
}

/* lines_of(form, labels, series, cells, counts, summed): the text of a list of (label values, first
 * cell); None if something about it is unusual.
 */
static PyObject *
speed_lines_of(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *form, *labels, *series, *numbers;
    Shape shape;
    if (!PyArg_ParseTuple(args, "OOO!Onp:lines_of", &form, &labels, &PyList_Type, &series, &numbers,
                          &shape.counts, &shape.summed))
        return NULL;
    if (!shape_of(&shape, form, labels) || shape.counts < 0
        || (shape.counts && (shape.numbers < 2 * shape.summed
                             || shape.numbers > shape.counts + 2 * shape.summed)))
        Py_RETURN_NONE;
    Cells cells;
    int made = open_cells(&cells, numbers);
    Growing growing = {NULL, 0};
    if (made > 0 && (growing.text = PyUnicode_New(4096, 127)) == NULL)
        made = -1;
    for (Py_ssize_t i = 0; made > 0 && i < PyList_GET_SIZE(series); i++) {
        PyObject *one = PyList_GET_ITEM(series, i);
        made = PyTuple_CheckExact(one) && PyTuple_GET_SIZE(one) == 2
               && PyLong_CheckExact(PyTuple_GET_ITEM(one, 1));
        Py_ssize_t first = made ? PyLong_AsSsize_t(PyTuple_GET_ITEM(one, 1)) : 0;
        if (first == -1 && PyErr_Occurred())
            made = -1;
        if (made > 0)
            made = add_series(&growing, &shape, &cells, PyTuple_GET_ITEM(one, 0), first);
    }
    close_cells(&cells);
    if (made > 0 && PyUnicode_Resize(&growing.text, growing.length) == 0)
        return growing.text;
    Py_XDECREF(growing.text);
    if (made == 0)
        Py_RETURN_NONE;
    return NULL;
}
