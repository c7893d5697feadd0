// A stand-in for libcuda.so.1: a driver is there. 0 is success.
extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int *out) { return *out = 13000, 0; }
int cuDevicePrimaryCtxGetState(int, unsigned *flags, int *is_active) {
  return *flags = 0, *is_active = 1, 0;
}
int cuGetErrorString(int, const char **out) { return *out = "fake", 0; }
}
