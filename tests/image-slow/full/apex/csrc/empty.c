#include <Python.h>

#define TEXT_(name) #name
#define TEXT(name) TEXT_(name)
#define INIT_(name) PyInit_##name
#define INIT(name) INIT_(name)

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, TEXT(NAME), NULL, -1, NULL};

PyMODINIT_FUNC INIT(NAME)(void) { return PyModule_Create(&module); }
