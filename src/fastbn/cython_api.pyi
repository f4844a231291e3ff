# For cimport: the functions are declared in cython_api.pxd.
