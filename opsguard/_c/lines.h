/* Access lines, as `logging.access`. */

enum { LINE = 4096, NUMBERS = 128, FIELDS = 10 };

/* What all lines with one status share: the text before each field, and behind the last. */
typedef struct {
    PyObject *template; /* what it was made of, borrowed; NULL: nothing yet */
    Py_ssize_t length;
    const char *ends[FIELDS + 1];
    char text[LINE];
} Form;

/* Where lines are put together. */
typedef struct {
    Form form;
    double second; /* of the last line, and the text of it up to its point */
    size_t moment_length;
    char moment[NUMBERS];
    char *at;
    char text[LINE];
} Line;

static inline void
add(Line *line, const char *text, size_t length)
{
    memcpy(line->at, text, length);
    line->at += length;
}

static inline void
add_quoted(Line *line, const char *text, size_t length)
{
    *line->at++ = '"';
    add(line, text, length);
    *line->at++ = '"';
}

/* A number, with zeros before it up to `digits`. */
static void
add_number(Line *line, unsigned long long number, int digits)
{
    char text[NUMBERS], *at = text + sizeof text;
    do
        *--at = (char)('0' + number % 10);
    while (number /= 10, --digits > 0 || number);
    add(line, at, text + sizeof text - at);
}

/* Whether one of eight bytes of ASCII is below a space, a quote, a backslash or DEL. */
static inline int
any_special(uint64_t word)
{
    const uint64_t ones = 0x0101010101010101u, tops = 0x8080808080808080u;
#define ZERO(bytes) (((bytes) - ones) & ~(bytes))
    return (((word - ones * ' ') | ZERO(word ^ ones * '"') | ZERO(word ^ ones * '\\')
             | ZERO(word ^ ones * 0x7f)) & tops) != 0;
#undef ZERO
}

/* The characters of a text that JSON writes as they are; NULL for any other. */
static const char *
plain_text(PyObject *object, Py_ssize_t *length)
{
    if (object == NULL || !is_ascii(object))
        return NULL;
    const char *text = (const char *)PyUnicode_1BYTE_DATA(object);
    *length = PyUnicode_GET_LENGTH(object);
    uint64_t word;
    Py_ssize_t left = *length;
    for (; left >= 8; text += 8, left -= 8) {
        memcpy(&word, text, 8);
        if (any_special(word))
            return NULL;
    }
    for (; left > 0; text++, left--)
        if (*text < ' ' || *text > '~' || *text == '"' || *text == '\\')
            return NULL;
    return text - *length;
}

/* The form of a %-template, whose fields are those of `access_template` in its order. 1, or 0: it is
 * another, or too long.
 */
static int
form_of(Form *form, PyObject *template)
{
    form->template = NULL;
    if (!PyUnicode_IS_COMPACT_ASCII(template) || PyUnicode_GET_LENGTH(template) > LINE)
        return 0;
    const char *from = (const char *)PyUnicode_1BYTE_DATA(template); /* with a NUL behind its end */
    char *to = form->text;
    int field = 0;
    for (; *from; from++) {
        if (*from != '%' || *++from == '%') {
            *to++ = *from; /* an escaped one, too */
            continue;
        }
        from += strcspn(from, "sd");
        if (!*from || field == FIELDS)
            return 0;
        form->ends[field++] = to;
    }
    form->ends[field] = to;
    form->length = to - form->text;
    if (field == FIELDS)
        form->template = template;
    return field == FIELDS;
}

/* The second of a moment as its text begins. 1, or 0: it is none that has one. */
static int
moment_of(Line *line, double at)
{
    struct tm parts;
    if (!(at >= 0.0 && at < 2e11))
        return 0;
    time_t whole = (time_t)at;
    if (gmtime_r(&whole, &parts) == NULL)
        return 0;
    line->moment_length = (size_t)snprintf(line->moment, NUMBERS, "%04d-%02d-%02dT%02d:%02d:%02d.",
                                           parts.tm_year + 1900, parts.tm_mon + 1, parts.tm_mday,
                                           parts.tm_hour, parts.tm_min, parts.tm_sec);
    line->second = (double)whole;
    return 1;
}

/* The line of an exchange, new reference. NULL without an exception where it takes the function in
 * Python.
 */
static PyObject *
line_of(Exchange *x, PyObject *template, double offset, Line *line)
{
    Py_ssize_t id_length, path_length, method_length, endpoint_length, client_length = 0;
    const char *id = plain_text(x->request_id, &id_length), *path = plain_text(x->path, &path_length);
    const char *method = plain_text(x->method, &method_length);
    const char *endpoint = plain_text(x->endpoint, &endpoint_length);
    const char *client = x->client == Py_None ? "" : plain_text(x->client, &client_length);
    if (id == NULL || path == NULL || method == NULL || endpoint == NULL || endpoint_length == 0
        || client == NULL || x->correlation_id != x->request_id || is_set(x->fields))
        return NULL;
    const Form *form = &line->form;
    if (form->template != template && !form_of(&line->form, template))
        return NULL;
    if (id_length > LINE || path_length > LINE || method_length > LINE || endpoint_length > LINE
        || client_length > LINE
        || form->length + id_length + path_length + method_length + endpoint_length + client_length
               + NUMBERS > LINE)
        return NULL;
    double at = offset + x->ended, fraction = at - line->second, duration = x->ended - x->started;
    if (!(duration >= 0.0 && duration < 1e9) || x->sent < 0)
        return NULL;
    if (!(fraction >= 0.0 && fraction < 1.0)) {
        if (!moment_of(line, at))
            return NULL;
        fraction = at - line->second;
    }
    unsigned long long micros = (unsigned long long)(duration * 1e6 + 0.5);
    const char *from = form->text;
    line->at = line->text;
    for (int field = 0; field < FIELDS; field++) {
        add(line, from, form->ends[field] - from);
        from = form->ends[field];
        switch (field) {
        case 0: add(line, line->moment, line->moment_length); break;
        case 1: add_number(line, (unsigned long long)(fraction * 1000.0), 3); break;
        case 2: add(line, id, id_length); break;
        case 3: add_quoted(line, method, method_length); break;
        case 4: add_quoted(line, path, path_length); break;
        case 5: add_quoted(line, endpoint, endpoint_length); break;
        case 6: add_number(line, micros / 1000, 1); break;
        case 7: add_number(line, micros % 1000, 3); break;
        case 8: add_number(line, (unsigned long long)x->sent, 1); break;
        case 9:
            if (x->client == Py_None)
                add(line, "null", 4);
            else
                add_quoted(line, client, client_length);
        }
    }
    add(line, from, form->ends[FIELDS] - from);
    PyObject *made = PyUnicode_New(line->at - line->text, 127);
    if (made != NULL)
        memcpy(PyUnicode_1BYTE_DATA(made), line->text, line->at - line->text);
    return made;
}

/* take_lines(queue, templates, offset, lines): takes from the queue what it has and appends the lines
 * of it to `lines`, as long as these are usual exchanges; then None, else the first that is not usual.
 */
static PyObject *
speed_take_lines(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (count != 4 || !Py_IS_TYPE(args[0], &QueueType) || !PyDict_CheckExact(args[1])
        || !PyList_CheckExact(args[3])) {
        PyErr_SetString(PyExc_TypeError, "take_lines(queue, templates, offset, lines)");
        return NULL;
    }
    double offset = PyFloat_AsDouble(args[2]);
    if (offset == -1.0 && PyErr_Occurred())
        return NULL;
    Line line;
    line.form.template = NULL;
    line.second = -HUGE_VAL;
    PyObject *taken;
    while ((taken = pull((Queue *)args[0])) != NULL) {
        Exchange *x = (Exchange *)taken;
        if (!PyObject_TypeCheck(taken, &ExchangeType) || x->method == NULL || x->endpoint == NULL
            || x->status == NULL)
            return taken;
        PyObject *found = PyDict_GetItemWithError(args[1], x->status);
        PyObject *made = NULL;
        Py_XINCREF(found);
        if (found != NULL && PyTuple_CheckExact(found) && PyTuple_GET_SIZE(found) == 2
            && PyUnicode_CheckExact(PyTuple_GET_ITEM(found, 0))
            && PyTuple_GET_ITEM(found, 1) == Py_False)
            made = line_of(x, PyTuple_GET_ITEM(found, 0), offset, &line);
        Py_XDECREF(found);
        if (made == NULL) {
            if (!PyErr_Occurred())
                return taken;
            Py_DECREF(taken);
            return NULL;
        }
        int failed = PyList_Append(args[3], made);
        Py_DECREF(made);
        Py_DECREF(taken);
        if (failed)
            return NULL;
    }
    Py_RETURN_NONE;
}
