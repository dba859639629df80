// Memory, streams, events and devices.
#define _GNU_SOURCE
#include "fake.h"
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, BAD_ALLOCATION = 207001, DEFAULT_STREAM_ID = 0 };

void note(const char *format, ...) {
  const char *path = getenv("FAKE_CANN_LOG");
  FILE *log = path ? fopen(path, "a") : NULL;
  if (!log) return;
  va_list values;
  va_start(values, format);
  vfprintf(log, format, values);
  va_end(values);
  fputc('\n', log);
  fclose(log);
}

static const char *setting(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value && *value ? value : otherwise;
}

// ------------------------------------------------------------------------------------------------------- streams

typedef struct task {
  void (*run)(void *);
  void *argument;
  struct task *next;
} task;

struct stream {
  task *first, *last;  // `first` stays in the queue while it runs
  int has_thread;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static stream default_stream;

static stream *stream_of(void *handle) { return handle ? handle : &default_stream; }

static void *carry_out(void *argument) {
  stream *on = argument;
  pthread_mutex_lock(&lock);
  for (;;) {
    while (!on->first) pthread_cond_wait(&changed, &lock);
    task *next = on->first;
    pthread_mutex_unlock(&lock);
    next->run(next->argument);
    pthread_mutex_lock(&lock);
    on->first = next->next;
    if (!on->first) on->last = NULL;
    free(next);
    pthread_cond_broadcast(&changed);
  }
  return NULL;
}

static void put_locked(stream *on, void (*run)(void *), void *argument) {
  task *added = calloc(1, sizeof *added);
  added->run = run;
  added->argument = argument;
  if (on->last) on->last->next = added;
  else on->first = added;
  on->last = added;
  if (!on->has_thread) {
    pthread_t thread;
    on->has_thread = 1;
    pthread_create(&thread, NULL, carry_out, on);
    pthread_detach(thread);
  }
  pthread_cond_broadcast(&changed);
}

void stream_put(stream *on, void (*run)(void *), void *argument) {
  pthread_mutex_lock(&lock);
  put_locked(stream_of(on), run, argument);
  pthread_mutex_unlock(&lock);
}

static int drain(void *handle) {
  stream *on = stream_of(handle);
  pthread_mutex_lock(&lock);
  while (on->first) pthread_cond_wait(&changed, &lock);
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

static int create(void **handle, size_t size) {
  *handle = calloc(1, size);
  return *handle ? SUCCESS : BAD_ALLOCATION;
}

int aclrtCreateStream(void **out) { return create(out, sizeof(stream)); }
int aclrtCreateStreamWithConfig(void **out, uint32_t priority, uint32_t flag) { return create(out, sizeof(stream)); }
int aclrtDestroyStream(void *handle) { return SUCCESS; }  // its thread may still need it
int aclrtDestroyStreamForce(void *handle) { return SUCCESS; }
int aclrtSynchronizeStream(void *handle) { return drain(handle); }
int aclrtSynchronizeStreamWithTimeout(void *handle, int32_t timeout) { return drain(handle); }
int aclrtStreamGetId(void *handle, int32_t *id) {
  *id = handle ? (int32_t)((uintptr_t)handle >> 6) : DEFAULT_STREAM_ID;
  return SUCCESS;
}
int aclrtStreamQuery(void *handle, int32_t *status) {
  pthread_mutex_lock(&lock);
  *status = stream_of(handle)->first != NULL;  // 0 is ACL_STREAM_STATUS_COMPLETE
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

// -------------------------------------------------------------------------------------------------------- events

typedef struct {
  uint64_t recorded, reached;
} event;

typedef struct {
  event *of;
  uint64_t number;
} mark;

static void reach(void *argument) {
  mark *one = argument;
  pthread_mutex_lock(&lock);
  if (one->of->reached < one->number) one->of->reached = one->number;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&lock);
  free(one);
}

static void await(void *argument) {
  mark *one = argument;
  pthread_mutex_lock(&lock);
  while (one->of->reached < one->number) pthread_cond_wait(&changed, &lock);
  pthread_mutex_unlock(&lock);
  free(one);
}

static mark *mark_of(event *of) {
  mark *one = calloc(1, sizeof *one);
  one->of = of;
  one->number = of->recorded;
  return one;
}

int aclrtCreateEvent(void **out) { return create(out, sizeof(event)); }
int aclrtCreateEventWithFlag(void **out, uint32_t flag) { return create(out, sizeof(event)); }
int aclrtCreateEventExWithFlag(void **out, uint32_t flag) { return create(out, sizeof(event)); }
int aclrtDestroyEvent(void *handle) { return SUCCESS; }  // a stream may still wait for it
int aclrtResetEvent(void *handle, void *on) { return SUCCESS; }

int aclrtRecordEvent(void *handle, void *on) {
  event *of = handle;
  pthread_mutex_lock(&lock);
  of->recorded++;
  if (stream_of(on)->first) put_locked(stream_of(on), reach, mark_of(of));
  else of->reached = of->recorded;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

int aclrtStreamWaitEvent(void *on, void *handle) {
  event *of = handle;
  pthread_mutex_lock(&lock);
  if (of->reached < of->recorded) put_locked(stream_of(on), await, mark_of(of));
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

static int has_reached(event *of) {
  pthread_mutex_lock(&lock);
  int reached = of->reached >= of->recorded;
  pthread_mutex_unlock(&lock);
  return reached;
}

int aclrtQueryEventStatus(void *handle, int *status) {
  *status = has_reached(handle);  // 1 is ACL_EVENT_RECORDED_STATUS_COMPLETE
  return SUCCESS;
}
int aclrtQueryEventWaitStatus(void *handle, int *status) {
  *status = !has_reached(handle);  // 0 is ACL_EVENT_WAIT_STATUS_COMPLETE
  return SUCCESS;
}
int aclrtSynchronizeEvent(void *handle) {
  event *of = handle;
  pthread_mutex_lock(&lock);
  for (uint64_t number = of->recorded; of->reached < number;) pthread_cond_wait(&changed, &lock);
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}
int aclrtSynchronizeEventWithTimeout(void *handle, int32_t timeout) { return aclrtSynchronizeEvent(handle); }
int aclrtEventElapsedTime(float *milliseconds, void *begin, void *end) {
  *milliseconds = 0.001f;
  return SUCCESS;
}
int aclrtEventGetTimestamp(void *handle, uint64_t *time) {
  *time = 0;
  return SUCCESS;
}

// -------------------------------------------------------------------------------------------------------- memory

static int allocate_host(void **out, size_t size) {
  size = size ? size : 512;
  if (posix_memalign(out, 512, size)) return BAD_ALLOCATION;
  memset(*out, 0xff, size);  // what nobody has written is NaN
  return SUCCESS;
}

// Device memory is a file without a name, so that another process can be let in: see HcclCommExchangeMem.
typedef struct block {
  char *begin;
  size_t size;
  int fd;
  struct block *next;
} block;

static block *blocks;

static int allocate_device(void **out, size_t size) {
  block *one = calloc(1, sizeof *one);
  one->size = size ? size : 512;
  one->fd = memfd_create("fake-npu", MFD_CLOEXEC);
  if (one->fd < 0 || ftruncate(one->fd, (off_t)one->size)) return BAD_ALLOCATION;
  one->begin = mmap(NULL, one->size, PROT_READ | PROT_WRITE, MAP_SHARED, one->fd, 0);
  if (one->begin == MAP_FAILED) return BAD_ALLOCATION;
  memset(one->begin, 0xff, one->size);
  pthread_mutex_lock(&lock);
  one->next = blocks;
  blocks = one;
  pthread_mutex_unlock(&lock);
  *out = one->begin;
  return SUCCESS;
}

int file_of(const void *memory, size_t *offset, size_t *size) {
  int fd = -1;
  pthread_mutex_lock(&lock);
  for (block *one = blocks; one; one = one->next)
    if ((char *)memory >= one->begin && (char *)memory < one->begin + one->size) {
      fd = one->fd;
      *offset = (size_t)((char *)memory - one->begin);
      *size = one->size;
    }
  pthread_mutex_unlock(&lock);
  return fd;
}

int aclrtMalloc(void **out, size_t size, int policy) { return allocate_device(out, size); }
int aclrtMallocAlign32(void **out, size_t size, int policy) { return allocate_device(out, size); }
int aclrtMallocHost(void **out, size_t size) { return allocate_host(out, size); }
int aclrtMallocHostWithCfg(void **out, uint64_t size, void *config) { return allocate_host(out, size); }
int aclrtFree(void *memory) {
  pthread_mutex_lock(&lock);
  block **at = &blocks, *found;
  while (*at && (*at)->begin != memory) at = &(*at)->next;
  if ((found = *at)) *at = found->next;
  pthread_mutex_unlock(&lock);
  if (!found) return SUCCESS;
  munmap(found->begin, found->size);
  close(found->fd);
  free(found);
  return SUCCESS;
}
int aclrtFreeHost(void *memory) {
  free(memory);
  return SUCCESS;
}
int aclrtMemcpy(void *target, size_t most, const void *source, size_t size, int kind) {
  if (size) memcpy(target, source, size);
  return SUCCESS;
}
int aclrtMemcpyAsync(void *target, size_t most, const void *source, size_t size, int kind, void *on) {
  drain(on);
  return aclrtMemcpy(target, most, source, size, kind);
}
int aclrtMemcpyAsyncWithCondition(void *target, size_t most, const void *source, size_t size, int kind, void *on) {
  return aclrtMemcpyAsync(target, most, source, size, kind, on);
}
int aclrtMemset(void *target, size_t most, int32_t value, size_t size) {
  memset(target, value, size);
  return SUCCESS;
}
int aclrtMemsetAsync(void *target, size_t most, int32_t value, size_t size, void *on) {
  drain(on);
  return aclrtMemset(target, most, value, size);
}
int aclrtGetMemInfo(int attribute, size_t *unused, size_t *total) {
  *unused = *total = 8UL << 30;
  return SUCCESS;
}

// ------------------------------------------------------------------------------------------------------- devices

static __thread int current;
static uint64_t contexts[64];

int aclrtGetDeviceCount(uint32_t *count) {
  *count = (uint32_t)atoi(setting("FAKE_CANN_DEVICES", "8"));
  return SUCCESS;
}
int aclrtSetDevice(int32_t device) {
  current = device;
  return SUCCESS;
}
int aclrtGetDevice(int32_t *device) {
  *device = current;
  return SUCCESS;
}
const char *aclrtGetSocName(void) { return setting("FAKE_CANN_SOC", "Ascend910_9391"); }
const char *aclGetRecentErrMsg(void) { return "a fake CANN"; }
int aclrtGetCurrentContext(void **context) {
  *context = &contexts[current];
  return SUCCESS;
}
int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return SUCCESS;
}
int aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t *value) {
  *value = 24;
  return SUCCESS;
}
int aclGetDeviceCapability(uint32_t device, int attribute, int64_t *value) {
  return aclrtGetDeviceInfo(device, attribute, value);
}
int aclrtGetLogicDevIdByUserDevId(int32_t user, int32_t *logic) {
  *logic = user;
  return SUCCESS;
}
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) {
  *can = 0;
  return SUCCESS;
}
int aclrtDeviceGetBareTgid(int32_t *pid) {
  *pid = 1;
  return SUCCESS;
}

typedef struct {
  char version[128], major[64], minor[64], release[64], patch[64], reserved[128];
} cann_version;

int aclsysGetCANNVersion(int package, cann_version *version) {
  memset(version, 0, sizeof *version);
  strcpy(version->version, "8.5.0");
  strcpy(version->major, "8");
  strcpy(version->minor, "5");
  strcpy(version->release, "0");
  return SUCCESS;
}
int aclsysGetVersionStr(char *package, char *version) {
  strcpy(version, "8.5.0");
  return SUCCESS;
}
