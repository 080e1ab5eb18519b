/* Access lines, as `logging.access`. */

enum { LINE = 4095, NUMBERS = 128, FIELDS = 10 }; /* with its newline, a line fits what a pipe takes at once */

/* What all lines with one status share: the text before each field, and behind the last. */
typedef struct {
    PyObject *template; /* what it was made of, borrowed; NULL: nothing yet */
    Py_ssize_t length;
    const char *ends[FIELDS + 1];
    char text[LINE];
} Form;

/* Where lines are put together, one behind the other with newlines between them. */
typedef struct {
    Form form;
    double second; /* of the last line, and the text of it up to its point */
    size_t moment_length;
    char moment[NUMBERS];
    char *at;
    char text[LINE];
} Lines;

static inline void
add(Lines *lines, const char *text, size_t length)
{
    memcpy(lines->at, text, length);
    lines->at += length;
}

static inline void
add_quoted(Lines *lines, const char *text, size_t length)
{
    *lines->at++ = '"';
    add(lines, text, length);
    *lines->at++ = '"';
}

/* A number, with zeros before it up to `digits`. */
static void
add_number(Lines *lines, unsigned long long number, int digits)
{
    char text[NUMBERS], *at = text + sizeof text;
    do
        *--at = (char)('0' + number % 10);
    while (number /= 10, --digits > 0 || number);
    add(lines, at, text + sizeof text - at);
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
moment_of(Lines *lines, double at)
{
    struct tm parts;
    if (!(at >= 0.0 && at < 2e11))
        return 0;
    time_t whole = (time_t)at;
    if (gmtime_r(&whole, &parts) == NULL)
        return 0;
    lines->moment_length = (size_t)snprintf(lines->moment, NUMBERS, "%04d-%02d-%02dT%02d:%02d:%02d.",
                                           parts.tm_year + 1900, parts.tm_mon + 1, parts.tm_mday,
                                           parts.tm_hour, parts.tm_min, parts.tm_sec);
    lines->second = (double)whole;
    return 1;
}

/* Put out what is put together. 0 or -1. */
static int
put_out(Lines *lines, PyObject *list)
{
    Py_ssize_t length = lines->at - lines->text;
    if (length == 0)
        return 0;
    PyObject *made = PyUnicode_New(length, 127);
    if (made == NULL)
        return -1;
    memcpy(PyUnicode_1BYTE_DATA(made), lines->text, length);
    lines->at = lines->text;
    int failed = PyList_Append(list, made);
    Py_DECREF(made);
    return failed;
}

/* Add the line of a brief; what is there already is put out if it would be too much. 1. 0: it takes
 * the function in Python; or -1.
 */
static int
add_line(Lines *lines, const Brief *brief, PyObject *template, double offset, PyObject *list)
{
    Py_ssize_t id_length, path_length, method_length, endpoint_length, client_length = 0;
    const char *id = plain_text(brief->request_id, &id_length);
    const char *path = plain_text(brief->path, &path_length);
    const char *method = plain_text(brief->method, &method_length);
    const char *endpoint = plain_text(brief->endpoint, &endpoint_length);
    const char *client = brief->client == Py_None ? "" : plain_text(brief->client, &client_length);
    if (id == NULL || path == NULL || method == NULL || endpoint == NULL || endpoint_length == 0
        || client == NULL)
        return 0;
    const Form *form = &lines->form;
    if (form->template != template && !form_of(&lines->form, template))
        return 0;
    if (id_length > LINE || path_length > LINE || method_length > LINE || endpoint_length > LINE
        || client_length > LINE)
        return 0;
    Py_ssize_t most = form->length + id_length + path_length + method_length + endpoint_length
                      + client_length + NUMBERS;
    double at = offset + brief->ended, fraction = at - lines->second;
    double duration = brief->ended - brief->started;
    if (most > LINE || !(duration >= 0.0 && duration < 1e9) || brief->sent < 0)
        return 0;
    if (!(fraction >= 0.0 && fraction < 1.0)) {
        if (!moment_of(lines, at))
            return 0;
        fraction = at - lines->second;
    }
    if (most > lines->text + LINE - lines->at && put_out(lines, list) < 0)
        return -1;
    if (lines->at > lines->text)
        *lines->at++ = '\n';
    unsigned long long micros = (unsigned long long)(duration * 1e6 + 0.5);
    const char *from = form->text;
    for (int field = 0; field < FIELDS; field++) {
        add(lines, from, form->ends[field] - from);
        from = form->ends[field];
        switch (field) {
        case 0: add(lines, lines->moment, lines->moment_length); break;
        case 1: add_number(lines, (unsigned long long)(fraction * 1000.0), 3); break;
        case 2: add(lines, id, id_length); break;
        case 3: add_quoted(lines, method, method_length); break;
        case 4: add_quoted(lines, path, path_length); break;
        case 5: add_quoted(lines, endpoint, endpoint_length); break;
        case 6: add_number(lines, micros / 1000, 1); break;
        case 7: add_number(lines, micros % 1000, 3); break;
        case 8: add_number(lines, (unsigned long long)brief->sent, 1); break;
        case 9:
            if (brief->client == Py_None)
                add(lines, "null", 4);
            else
                add_quoted(lines, client, client_length);
        }
    }
    add(lines, from, form->ends[FIELDS] - from);
    return 1;
}

/* The template of a status whose lines are wanted and may wait; new reference, or NULL, with or without
 * an exception.
 */
static PyObject *
template_of(PyObject *templates, PyObject *status)
{
    if (status == NULL || !PyLong_CheckExact(status))
        return NULL;
    PyObject *found = PyDict_GetItemWithError(templates, status);
    if (found == NULL || !PyTuple_CheckExact(found) || PyTuple_GET_SIZE(found) != 2
        || !PyUnicode_CheckExact(PyTuple_GET_ITEM(found, 0)) || PyTuple_GET_ITEM(found, 1) != Py_False)
        return NULL;
    return Py_NewRef(PyTuple_GET_ITEM(found, 0));
}

/* take_lines(queue, templates, offset, list): takes from the queue what it has and appends the lines
 * of it to the list, several to a text, as long as these are usual exchanges; then None, else the
 * first that is not usual.
 */
static PyObject *
speed_take_lines(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (count != 4 || !Py_IS_TYPE(args[0], &QueueType) || !PyDict_CheckExact(args[1])
        || !PyList_CheckExact(args[3])) {
        PyErr_SetString(PyExc_TypeError, "take_lines(queue, templates, offset, list)");
        return NULL;
    }
    double offset = PyFloat_AsDouble(args[2]);
    if (offset == -1.0 && PyErr_Occurred())
        return NULL;
    Lines lines;
    lines.form.template = NULL;
    lines.second = -HUGE_VAL;
    lines.at = lines.text;
    PyObject *unusual = NULL;
    Brief brief;
    while (pull((Queue *)args[0], &brief)) {
        int usual = brief.other == NULL && brief.correlation_id == brief.request_id
                    && !is_set(brief.fields);
        PyObject *template = usual ? template_of(args[1], brief.status) : NULL;
        int added = template == NULL ? 0 : add_line(&lines, &brief, template, offset, args[3]);
        Py_XDECREF(template);
        if (added == 0 && !PyErr_Occurred() && (unusual = restored(&brief)) != NULL)
            break;
        let_go(&brief);
        if (added <= 0)
            return NULL;
    }
    if (put_out(&lines, args[3]) < 0) {
        Py_XDECREF(unusual);
        return NULL;
    }
    return unusual == NULL ? Py_NewRef(Py_None) : unusual;
}
