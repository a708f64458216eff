// A libcuda.so.1 without a GPU for test_cuda_driver.py: notes each call, gives out fixed handles, fails on request.
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>

static std::mutex lock;
static std::string calls, planted_function;
static int planted_result = 0;
static thread_local void* current = nullptr;
// Of each kernel: bytes of its parameters.  The second one takes none.
static const int sizes[2][5] = {{8, 8, 8, 4, 0}, {0}};

// As far as the driver's documentation promises, a function does not take over its kernel's limit.
static const int default_limit = 48 * 1024 - 256;
static int limits[2] = {default_limit, default_limit};

static int called(const char* function, const char* format = "", ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::lock_guard<std::mutex> guard(lock);
  calls += std::string(function) + "(" + text + ")\n";
  return planted_function == function ? planted_result : 0;
}

extern "C" {
void plant(const char* function, int result) { planted_function = function; planted_result = result; }
void take_calls(char* out, int room) {
  std::lock_guard<std::mutex> guard(lock);
  snprintf(out, room, "%s", calls.c_str());
  calls.clear();
}
int cuInit(unsigned flags) { return called("cuInit", "%u", flags); }
int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
int cuGetErrorName(int result, const char** name) {
  *name = result == 999 ? nullptr : "CUDA_ERROR_PLANTED";
  return result == 999;
}
int cuGetErrorString(int result, const char** text) {
  *text = result == 999 ? nullptr : "this was planted";
  return result == 999;
}
int cuDeviceGet(int* device, int ordinal) { *device = ordinal + 100; return called("cuDeviceGet", "%d", ordinal); }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)(long)(0xC000 + device - 100);
  return called("cuDevicePrimaryCtxRetain", "%d", device);
}
int cuCtxGetCurrent(void** context) {
  // Python's lock is free meanwhile: another thread may pack its arguments.
  std::this_thread::sleep_for(std::chrono::microseconds(20));
  *context = current;
  return 0;
}
int cuCtxSetCurrent(void* context) { current = context; return called("cuCtxSetCurrent", "%lx", (long)context); }
#ifndef BEFORE_12_0
int cuLibraryLoadData(void** library, const void* code, void*, void*, unsigned a, void*, void*, unsigned b) {
  *library = (void*)0xA;
  limits[0] = limits[1] = default_limit;
  return called("cuLibraryLoadData", "%.8s, %u, %u", (const char*)code, a, b);
}
#endif
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  *kernel = (void*)(strcmp(name, "add") ? 0x21L : 0x20L);
  return called("cuLibraryGetKernel", "%lx, %s", (long)library, name);
}
int cuKernelGetFunction(void** function, void* kernel) {
  *function = (void*)((long)kernel + 0xF00);
  return called("cuKernelGetFunction", "%lx, in %lx", (long)kernel, (long)current);
}
int cuKernelGetAttribute(int* value, int attribute, void* kernel, int device) {
  *value = default_limit;
  return called("cuKernelGetAttribute", "%d, %lx, %d", attribute, (long)kernel, device);
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  const int result = called("cuFuncSetAttribute", "%lx, %d, %d in %lx", (long)function, attribute, value, (long)current);
  if (result == 0 && attribute == 8) limits[(long)function - 0xF20] = value;
  return result;
}
int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  return called("cuKernelSetAttribute", "%d, %d, %lx, %d", attribute, value, (long)kernel, device);
}
#ifndef BEFORE_12_4
int cuKernelGetParamInfo(void* kernel, size_t index, size_t* offset, size_t* size) {
  *offset = 8 * index;
  *size = sizes[(long)kernel - 0x20][index];
  return *size ? 0 : 1;
}
#endif
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  std::string values;
  for (const int* size = sizes[(long)function - 0xF20]; *size; ++size, ++parameters) {
    char text[40];
    if (*size == 8) snprintf(text, sizeof text, " %lld", *(long long*)*parameters);
    else snprintf(text, sizeof text, " %.9g", *(float*)*parameters);
    values += text;
  }
  const int result =
      called("cuLaunchKernel", "%lx, %u %u %u, %u %u %u, %u, %lx,%s, %lx in %lx", (long)function, gx, gy, gz, bx, by,
             bz, shared, (long)stream, values.c_str(), (long)extra, (long)current);
  return result ? result : (int)shared > limits[(long)function - 0xF20];  // 1 is CUDA_ERROR_INVALID_VALUE
}
}
