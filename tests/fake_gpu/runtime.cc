// A stand-in for libcudart, loaded before it: one GPU whose kernels do nothing.
//
// No header of CUDA's: its functions change their parameters between versions, and
// those that are looked at here come first in all of them. 0 is success.
#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace {
using Heard = void (*)(const char *);
Heard heard = nullptr;

// The host would stand still here until the device is done.
int wait_for(const char *what) {
  if (heard != nullptr) heard(what);
  return 0;
}

constexpr size_t kFreeBytes = size_t{100} << 30, kTotalBytes = size_t{139} << 30;
void *const kHandle = reinterpret_cast<void *>(0x10);

int take(void **out, size_t num_bytes) {
  *out = std::calloc(num_bytes, 1);
  return 0;
}
}  // namespace

extern "C" {
void fake_gpu_tell(Heard callback) { heard = callback; }

int cudaGetDeviceCount(int *out) { return *out = 1, 0; }
int cudaGetDevice(int *out) { return *out = 0; }
int cudaSetDevice(int) { return 0; }
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
int cudaDriverGetVersion(int *out) { return *out = 13000, 0; }
int cudaDeviceGetAttribute(int *out, int, int) { return *out = 1, 0; }
int cudaDeviceCanAccessPeer(int *out, int, int) { return *out = 0; }
int cudaDeviceEnablePeerAccess(int, unsigned) { return 0; }
int cudaDeviceGetDefaultMemPool(void **out, int) { return *out = kHandle, 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  return *least = 0, *greatest = -5, 0;
}
int cudaGetDriverEntryPointByVersion(const char *, void **out, unsigned,
                                     unsigned long long, int *found) {
  if (found != nullptr) *found = 1;  // cudaDriverEntryPointSymbolNotFound
  return *out = nullptr, 0;
}

int cudaStreamCreateWithPriority(void **out, unsigned, int) {
  return *out = kHandle, 0;
}
int cudaStreamGetPriority(void *, int *out) { return *out = 0; }
int cudaStreamQuery(void *) { return 0; }
int cudaStreamWaitEvent(void *, void *, unsigned) { return 0; }
int cudaStreamIsCapturing(void *, int *out) { return *out = 0; }
int cudaThreadExchangeStreamCaptureMode(int *) { return 0; }
int cudaStreamGetCaptureInfo(void *, int *out) { return *out = 0; }
int cudaStreamGetCaptureInfo_v2(void *, int *out) { return *out = 0; }
int cudaStreamGetCaptureInfo_v3(void *, int *out) { return *out = 0; }

int cudaEventCreateWithFlags(void **out, unsigned) { return *out = kHandle, 0; }
int cudaEventDestroy(void *) { return 0; }
int cudaEventRecord(void *, void *) { return 0; }
int cudaEventRecordWithFlags(void *, void *, unsigned) { return 0; }
int cudaEventQuery(void *) { return 0; }
int cudaEventElapsedTime(float *out, void *, void *) { return *out = 1.0f, 0; }

int cudaStreamSynchronize(void *) { return wait_for("a stream"); }
int cudaEventSynchronize(void *) { return wait_for("an event"); }
int cudaDeviceSynchronize() { return wait_for("the device"); }

int cudaMalloc(void **out, size_t num_bytes) { return take(out, num_bytes); }
int cudaFree(void *memory) { return std::free(memory), 0; }
int cudaHostAlloc(void **out, size_t num_bytes, unsigned) {
  return take(out, num_bytes);
}
int cudaFreeHost(void *memory) { return std::free(memory), 0; }
int cudaMemGetInfo(size_t *available, size_t *total) {
  return *available = kFreeBytes, *total = kTotalBytes, 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t num_bytes, int, void *) {
  return std::memcpy(to, from, num_bytes), 0;
}
int cudaMemsetAsync(void *to, int value, size_t num_bytes, void *) {
  return std::memset(to, value, num_bytes), 0;
}
struct Grid {
  unsigned x, y, z;
};
int cudaLaunchKernel(const void *, Grid, Grid, void **, size_t, void *) { return 0; }
int cudaLaunchKernelExC(const void *, const void *, void **) { return 0; }
int cudaFuncSetAttribute(const void *, int, int) { return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *out, const void *, int, size_t) {
  return *out = 1, 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *out, const void *, int,
                                                           size_t, unsigned) {
  return *out = 1, 0;
}
}
