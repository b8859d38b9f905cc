// A stand-in for NVIDIA's driver, libcuda.so.1, on the CPU: enough of it for runtime/cuda.py.
//
// cuda.bindings loads it as it would load the driver, so that every call, argument and order of ours
// is the real one. Work is queued and done as late as may be, when someone waits; page-locked memory
// is read then; new memory holds rubbish. Kernels are the package's own sources, compiled for the
// host (kernels.inc is written by the test). What a GPU forbids is an error here too: addresses of
// the wrong side, calls without a context, waiting and allocating while a graph is recorded.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "kernels.inc"

typedef int Result;
typedef std::function<void()> Work;
enum {
  OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_CONTEXT = 201,
  INVALID_IMAGE = 200, NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901
};

static const size_t TOTAL = size_t(1) << 30;
static std::map<char*, size_t> device_memory, pinned_memory;
static size_t used = 0;
static long context_users = 0;
static thread_local bool has_context = false;
static std::vector<Work> queue;            // of the one stream
static std::vector<Work>* recording = nullptr;
static bool invalidated = false;

struct Event { bool passed = true; double at_ms = 0; };
static double clock_ms = 0;  // one more for each piece of work

#define NEEDS_CONTEXT if (!has_context) return INVALID_CONTEXT
#define NOT_WHILE_RECORDING if (recording) { invalidated = true; return CAPTURE_UNSUPPORTED; }

static bool inside(const std::map<char*, size_t>& memory, const void* at, size_t bytes) {
  char* p = (char*)at;
  auto next = memory.upper_bound(p);
  if (next == memory.begin()) return false;
  auto found = std::prev(next);
  return p + bytes <= found->first + found->second;
}

static Result put(Work work) {
  if (recording) recording->push_back(work);
  else queue.push_back(work);
  return OK;
}

static void drain() {
  for (auto& work : queue) { work(); clock_ms += 1; }
  queue.clear();
}

static Result allocate(std::map<char*, size_t>& memory, void** out, size_t bytes) {
  if (bytes == 0) return INVALID_VALUE;
  if (used + bytes > TOTAL) return OUT_OF_MEMORY;
  char* made = (char*)aligned_alloc(256, (bytes + 255) / 256 * 256);
  memset(made, 0xCB, bytes);
  memory[made] = bytes;
  used += bytes;
  *out = made;
  return OK;
}

static Result release(std::map<char*, size_t>& memory, void* p) {
  auto found = memory.find((char*)p);
  if (found == memory.end()) return INVALID_VALUE;  // never made, or freed before
  drain();
  used -= found->second;
  memory.erase(found);
  free(p);
  return OK;
}

static Result Init(unsigned) {
  return getenv("CUDA_DOUBLE_NO_GPU") ? NO_DEVICE : OK;
}
static Result DriverGetVersion(int* v) { *v = 13000; return OK; }
static Result DeviceGetCount(int* n) { *n = 1; return OK; }
static Result DeviceGet(int* device, int index) { *device = index; return index ? INVALID_VALUE : OK; }
static Result DeviceGetName(char* name, int n, int) { snprintf(name, n, "Double of a GPU"); return OK; }
static Result DeviceGetAttribute(int* value, int which, int) {
  *value = which == 75 ? 9 : which == 76 ? 0 : -1;  // compute capability 9.0
  return OK;
}
static Result PrimaryCtxRetain(void** context, int) { ++context_users; *context = &context_users; return OK; }
static Result CtxSetCurrent(void* context) { has_context = context == &context_users; return OK; }
static Result CtxGetCurrent(void** context) { *context = has_context ? &context_users : nullptr; return OK; }
static thread_local std::vector<bool> pushed;
static Result CtxPushCurrent(void* context) { pushed.push_back(has_context); return CtxSetCurrent(context); }
static Result CtxPopCurrent(void** context) {
  CtxGetCurrent(context);
  if (pushed.empty()) return INVALID_CONTEXT;
  has_context = pushed.back();
  pushed.pop_back();
  return OK;
}

static Result MemAlloc(void** p, size_t bytes) {
  NEEDS_CONTEXT; NOT_WHILE_RECORDING; return allocate(device_memory, p, bytes);
}
static Result MemFree(void* p) { NEEDS_CONTEXT; NOT_WHILE_RECORDING; return release(device_memory, p); }
static Result MemHostAlloc(void** p, size_t bytes, unsigned) {
  NEEDS_CONTEXT; NOT_WHILE_RECORDING; return allocate(pinned_memory, p, bytes);
}
static Result MemFreeHost(void* p) { NEEDS_CONTEXT; NOT_WHILE_RECORDING; return release(pinned_memory, p); }
static Result MemGetInfo(size_t* available, size_t* total) {
  NEEDS_CONTEXT; *available = TOTAL - used; *total = TOTAL; return OK;
}

static Result StreamCreate(void** stream, unsigned flags) {
  NEEDS_CONTEXT;
  if (flags != 1) return INVALID_VALUE;  // ours does not wait for the default stream
  *stream = &queue;
  return OK;
}
static Result StreamDestroy(void* stream) { drain(); return stream == &queue ? OK : INVALID_VALUE; }
static Result StreamSynchronize(void* stream) {
  NEEDS_CONTEXT;
  if (stream != &queue) return INVALID_VALUE;
  NOT_WHILE_RECORDING;
  drain();
  return OK;
}

static Result HtoD(void* to, const void* from, size_t bytes, void* stream) {
  NEEDS_CONTEXT;
  if (stream != &queue || !inside(device_memory, to, bytes) || inside(device_memory, from, bytes))
    return INVALID_VALUE;
  if (inside(pinned_memory, from, bytes)) return put([=] { memcpy(to, from, bytes); });
  std::vector<char> staged((const char*)from, (const char*)from + bytes);
  return put([=] { memcpy(to, staged.data(), bytes); });
}
static Result DtoH(void* to, const void* from, size_t bytes, void* stream) {
  NEEDS_CONTEXT;
  if (stream != &queue || !inside(device_memory, from, bytes) || inside(device_memory, to, bytes))
    return INVALID_VALUE;
  return put([=] { memcpy(to, from, bytes); });
}
static Result DtoD(void* to, const void* from, size_t bytes, void* stream) {
  NEEDS_CONTEXT;
  if (stream != &queue || !inside(device_memory, from, bytes) || !inside(device_memory, to, bytes))
    return INVALID_VALUE;
  return put([=] { memcpy(to, from, bytes); });
}

static Result EventCreate(void** event, unsigned) { NEEDS_CONTEXT; *event = new Event; return OK; }
static Result EventDestroy(void* event) { if (!recording) drain(); delete (Event*)event; return OK; }
static Result EventRecord(void* event, void* stream) {
  NEEDS_CONTEXT;
  Event* e = (Event*)event;
  if (stream == (void*)1 || stream == (void*)2) return e->passed = true, OK;  // nothing is on those
  if (stream != &queue) return INVALID_VALUE;
  e->passed = false;
  return put([=] { e->passed = true; e->at_ms = clock_ms; });
}
static Result StreamWaitEvent(void* stream, void* event, unsigned flags) {
  NEEDS_CONTEXT;
  return stream == &queue && event && !flags ? OK : INVALID_VALUE;
}
static Result EventSynchronize(void* event) {
  NEEDS_CONTEXT; NOT_WHILE_RECORDING;
  Event* e = (Event*)event;
  while (!e->passed && !queue.empty()) {
    Work work = queue.front();
    queue.erase(queue.begin());
    work();
    clock_ms += 1;
  }
  return e->passed ? OK : INVALID_VALUE;
}
static Result EventElapsedTime(float* ms, void* from, void* to) {
  NEEDS_CONTEXT;
  if (!((Event*)from)->passed || !((Event*)to)->passed) return 600;  // not ready
  *ms = float(((Event*)to)->at_ms - ((Event*)from)->at_ms);
  return OK;
}

static Result BeginCapture(void* stream, int mode) {
  NEEDS_CONTEXT;
  if (stream != &queue || mode != 1 || recording) return INVALID_VALUE;  // 1: thread-local
  recording = new std::vector<Work>;
  invalidated = false;
  return OK;
}
static Result EndCapture(void* stream, void** graph) {
  NEEDS_CONTEXT;
  *graph = nullptr;
  if (stream != &queue || !recording) return INVALID_VALUE;
  auto* made = recording;
  recording = nullptr;
  if (invalidated) { delete made; return CAPTURE_INVALIDATED; }
  *graph = made;
  return OK;
}
static Result Instantiate(void** exec, void* graph, unsigned long long flags) {
  NEEDS_CONTEXT;
  if (!graph || flags) return INVALID_VALUE;
  *exec = new std::vector<Work>(*(std::vector<Work>*)graph);
  return OK;
}
static Result DestroyGraph(void* graph) { if (!recording) drain(); delete (std::vector<Work>*)graph; return OK; }
static Result GraphUpload(void* exec, void* stream) { NEEDS_CONTEXT; return exec && stream == &queue ? OK : INVALID_VALUE; }
static Result GraphLaunch(void* exec, void* stream) {
  NEEDS_CONTEXT; NOT_WHILE_RECORDING;
  if (!exec || stream != &queue) return INVALID_VALUE;
  return put([=] { for (auto& work : *(std::vector<Work>*)exec) work(); });
}

static Result ModuleLoadData(void** module, const void* image) {
  NEEDS_CONTEXT; NOT_WHILE_RECORDING;
  if (memcmp(image, "\177ELF", 4) != 0) return INVALID_IMAGE;
  *module = (void*)&kernels;
  return OK;
}
static Result ModuleGetFunction(void** function, void* module, const char* name) {
  NEEDS_CONTEXT;
  if (module != (void*)&kernels) return INVALID_VALUE;
  for (auto& kernel : kernels)
    if (!strcmp(kernel.name, name)) { *function = (void*)&kernel; return OK; }
  return NOT_FOUND;
}
static Result LaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                           unsigned by, unsigned bz, unsigned shared, void* stream, void** params,
                           void** extra) {
  NEEDS_CONTEXT;
  Kernel* kernel = (Kernel*)function;
  if (stream != &queue || gy != 1 || gz != 1 || by != 1 || bz != 1 || shared || extra || !gx || !bx
      || bx > 1024)
    return INVALID_VALUE;
  std::vector<uint64_t> values;
  for (const char* kind = kernel->kinds; *kind; ++kind) {
    void* at = params[kind - kernel->kinds];
    if (*kind == 'p') {
      values.push_back(*(uint64_t*)at);
      if (!inside(device_memory, (void*)values.back(), 1)) return INVALID_VALUE;
    } else {
      values.push_back(*(uint32_t*)at);
    }
  }
  return put([=] {
    blockDim.x = bx;
    for (unsigned block = 0; block < gx; ++block)
      for (unsigned thread = 0; thread < bx; ++thread) {
        blockIdx.x = block;
        threadIdx.x = thread;
        kernel->call(values.data());
      }
  });
}

static Result GetErrorString(int code, const char** text) { *text = code == OUT_OF_MEMORY ? "out of memory" : "as a GPU would say"; return OK; }

extern "C" int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
  static const std::map<std::string, void*> known = {
    {"cuInit", (void*)Init}, {"cuDriverGetVersion", (void*)DriverGetVersion},
    {"cuGetErrorString", (void*)GetErrorString}, {"cuDeviceGetCount", (void*)DeviceGetCount},
    {"cuDeviceGet", (void*)DeviceGet}, {"cuDeviceGetName", (void*)DeviceGetName},
    {"cuDeviceGetAttribute", (void*)DeviceGetAttribute},
    {"cuDevicePrimaryCtxRetain", (void*)PrimaryCtxRetain},
    {"cuCtxSetCurrent", (void*)CtxSetCurrent}, {"cuCtxGetCurrent", (void*)CtxGetCurrent},
    {"cuCtxPushCurrent", (void*)CtxPushCurrent}, {"cuCtxPopCurrent", (void*)CtxPopCurrent}, {"cuMemAlloc", (void*)MemAlloc},
    {"cuMemFree", (void*)MemFree}, {"cuMemHostAlloc", (void*)MemHostAlloc},
    {"cuMemFreeHost", (void*)MemFreeHost}, {"cuMemGetInfo", (void*)MemGetInfo},
    {"cuStreamCreate", (void*)StreamCreate}, {"cuStreamDestroy", (void*)StreamDestroy},
    {"cuStreamSynchronize", (void*)StreamSynchronize}, {"cuMemcpyHtoDAsync", (void*)HtoD},
    {"cuMemcpyDtoHAsync", (void*)DtoH}, {"cuMemcpyDtoDAsync", (void*)DtoD},
    {"cuEventCreate", (void*)EventCreate}, {"cuEventDestroy", (void*)EventDestroy},
    {"cuEventRecord", (void*)EventRecord}, {"cuStreamWaitEvent", (void*)StreamWaitEvent}, {"cuEventSynchronize", (void*)EventSynchronize},
    {"cuEventElapsedTime", (void*)EventElapsedTime}, {"cuStreamBeginCapture", (void*)BeginCapture},
    {"cuStreamEndCapture", (void*)EndCapture}, {"cuGraphInstantiateWithFlags", (void*)Instantiate},
    {"cuGraphUpload", (void*)GraphUpload}, {"cuGraphLaunch", (void*)GraphLaunch},
    {"cuGraphExecDestroy", (void*)DestroyGraph}, {"cuGraphDestroy", (void*)DestroyGraph},
    {"cuModuleLoadData", (void*)ModuleLoadData}, {"cuModuleGetFunction", (void*)ModuleGetFunction},
    {"cuLaunchKernel", (void*)LaunchKernel},
  };
  auto found = known.find(name);
  *function = found == known.end() ? nullptr : found->second;
  if (status) *status = *function ? 0 : 1;
  return *function ? OK : NOT_FOUND;
}
extern "C" int cuInit(unsigned flags) { return Init(flags); }
// NVRTC asks for it, to keep its results; without it, it does not.
extern "C" int cuGetExportTable(const void** table, const void*) { *table = nullptr; return NOT_FOUND; }
