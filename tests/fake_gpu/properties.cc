// What the stand-in's GPU is: structs whose layout CUDA's headers have to tell.
#include <driver_types.h>

#include <cstring>

extern "C" {
int cudaGetDeviceProperties_v2(cudaDeviceProp *of, int) {
  std::memset(of, 0, sizeof *of);
  std::strcpy(of->name, "Fake H200");
  of->major = 9;
  of->multiProcessorCount = 132;
  of->totalGlobalMem = size_t{139} << 30;
  of->warpSize = 32;
  of->maxThreadsPerMultiProcessor = 2048;
  of->maxThreadsPerBlock = 1024;
  of->sharedMemPerBlock = 49152;
  of->sharedMemPerBlockOptin = 232448;
  of->sharedMemPerMultiprocessor = 233472;
  of->regsPerMultiprocessor = 65536;
  of->l2CacheSize = 60 << 20;
  of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024;
  of->maxThreadsDim[2] = 64;
  of->maxGridSize[0] = 2147483647;
  of->maxGridSize[1] = of->maxGridSize[2] = 65535;
  return 0;
}

int cudaFuncGetAttributes(cudaFuncAttributes *of, const void *) {
  std::memset(of, 0, sizeof *of);
  of->maxThreadsPerBlock = 1024;
  of->numRegs = 32;
  of->ptxVersion = of->binaryVersion = 90;
  return 0;
}

#undef cudaGetDeviceProperties
int cudaGetDeviceProperties(cudaDeviceProp *of, int at) {
  return cudaGetDeviceProperties_v2(of, at);
}
}
