// HCCL between processes of one machine: every two ranks of a communicator share a Unix socket.
//
// A rank that dies, or that expects another size than it is sent, leaves the others waiting for ever, which is the
// worst that HCCL does: nobody who uses it may count on being told.
#define _GNU_SOURCE
#include "fake.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, INTERNAL = 4, NOT_SUPPORTED = 5, TIMEOUT = 9, MOST_RANKS = 64, ROOT_BYTES = 4108, NAME_BYTES = 128 };

typedef struct {
  char reserved[24];
  uint32_t buffer_megabytes, deterministic;
  char name[NAME_BYTES];
} config;  // the beginning of HcclCommConfig in hccl_types.h

typedef struct {
  char *begin;
  uint64_t size;
} window;

typedef struct communicator {
  char name[NAME_BYTES];
  uint32_t size, rank;
  int sockets[MOST_RANKS];
  window windows[MOST_RANKS];  // its own, and those of peers as they are mapped here
  struct communicator *next;
} communicator;

typedef struct {
  char *bytes;
  uint64_t length, done;
} part;

typedef struct {
  communicator *over;
  part sent[MOST_RANKS], received[MOST_RANKS];
} exchange;

static const uint64_t ELEMENT_BYTES[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2, 16};

static uint64_t bytes_of(int dtype) {
  return dtype >= 0 && dtype < (int)(sizeof ELEMENT_BYTES / sizeof *ELEMENT_BYTES) ? ELEMENT_BYTES[dtype] : 0;
}

// ----------------------------------------------------------------------------------------------------- connecting

static socklen_t address_of(struct sockaddr_un *address, const char *name, uint32_t rank) {
  memset(address, 0, sizeof *address);
  address->sun_family = AF_UNIX;  // an abstract name: a leading zero byte, and no file to be left behind
  int length = snprintf(address->sun_path + 1, sizeof address->sun_path - 1, "%.90s/%u", name, rank);
  return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);
}

static int connect_to(const char *name, uint32_t peer, uint32_t rank, time_t deadline) {
  struct sockaddr_un address;
  socklen_t length = address_of(&address, name, peer);
  for (;;) {
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&address, length) == 0 && write(fd, &rank, sizeof rank) == sizeof rank) return fd;
    close(fd);
    if (time(NULL) > deadline) return -1;
    usleep(5000);
  }
}

static int accept_one(communicator *one, int listener, time_t deadline) {
  struct pollfd waiting = {listener, POLLIN, 0};
  while (poll(&waiting, 1, 200) <= 0)
    if (time(NULL) > deadline) return TIMEOUT;
  uint32_t peer;
  int fd = accept(listener, NULL, NULL);
  if (fd < 0 || read(fd, &peer, sizeof peer) != sizeof peer || peer >= one->size) return INTERNAL;
  one->sockets[peer] = fd;
  return SUCCESS;
}

static int connect_all(communicator *one) {
  const char *limit = getenv("HCCL_CONNECT_TIMEOUT");
  time_t deadline = time(NULL) + (limit ? atoi(limit) : 120);
  struct sockaddr_un address;
  socklen_t length = address_of(&address, one->name, one->rank);
  int listener = socket(AF_UNIX, SOCK_STREAM, 0);
  if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, MOST_RANKS)) return INTERNAL;
  for (uint32_t peer = 0; peer < one->rank; peer++)
    if ((one->sockets[peer] = connect_to(one->name, peer, one->rank, deadline)) < 0) return TIMEOUT;
  for (uint32_t peer = one->rank + 1; peer < one->size; peer++) {
    int failure = accept_one(one, listener, deadline);
    if (failure) return failure;
  }
  close(listener);
  for (uint32_t peer = 0; peer < one->size; peer++)
    if (peer != one->rank) fcntl(one->sockets[peer], F_SETFL, O_NONBLOCK);
  return SUCCESS;
}

int HcclGetRootInfo(char *root) {
  struct timeval now;
  gettimeofday(&now, NULL);
  memset(root, 0, ROOT_BYTES);
  snprintf(root, NAME_BYTES, "fake-hccl-%d-%ld-%ld", getpid(), (long)now.tv_sec, (long)now.tv_usec);
  return SUCCESS;
}

static communicator *communicators;
static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;

static int open_communicator(uint32_t size, const char *root, uint32_t rank, const config *with, void **out) {
  if (size > MOST_RANKS) return NOT_SUPPORTED;
  communicator *one = calloc(1, sizeof *one);
  one->size = size;
  one->rank = rank;
  snprintf(one->name, NAME_BYTES, "%.120s", root);
  *out = one;
  pthread_mutex_lock(&list_lock);
  one->next = communicators;
  communicators = one;
  pthread_mutex_unlock(&list_lock);
  note("communicator rank=%u size=%u buffer=%d", rank, size, with ? (int)with->buffer_megabytes : -1);
  return connect_all(one);
}

int HcclCommInitRootInfo(uint32_t size, const char *root, uint32_t rank, void **out) {
  return open_communicator(size, root, rank, NULL, out);
}
int HcclCommInitRootInfoConfig(uint32_t size, const char *root, uint32_t rank, const config *with, void **out) {
  return open_communicator(size, root, rank, with, out);
}
unsigned HcclGetCommConfigCapability(void) { return 8; }
int HcclGetCommName(communicator *one, char *name) {
  strcpy(name, one->name);
  return SUCCESS;
}
int HcclGetCommAsyncError(communicator *one, int *error) {
  *error = SUCCESS;
  return SUCCESS;
}
int HcclGetRankId(communicator *one, uint32_t *rank) {
  *rank = one->rank;
  return SUCCESS;
}
int HcclGetRankSize(communicator *one, uint32_t *size) {
  *size = one->size;
  return SUCCESS;
}
int HcclCommDestroy(communicator *one) {
  for (uint32_t peer = 0; peer < one->size; peer++)
    if (peer != one->rank) shutdown(one->sockets[peer], SHUT_RDWR);
  return SUCCESS;
}

// ---------------------------------------------------------------------------------------------------- moving bytes

static _Noreturn void wait_for_ever(const char *why) {
  note("stuck: %s", why);
  for (;;) pause();
}

// One message is its length and its bytes. `done` counts both.
static void send_some(int fd, part *one) {
  uint64_t head = sizeof one->length;
  const char *from = one->done < head ? (char *)&one->length + one->done : one->bytes + (one->done - head);
  uint64_t left = one->done < head ? head - one->done : one->length - (one->done - head);
  ssize_t count = send(fd, from, left, MSG_NOSIGNAL);
  if (count > 0) one->done += (uint64_t)count;
  else if (errno != EAGAIN && errno != EINTR) wait_for_ever("a rank is gone");
}

static void receive_some(int fd, part *one, uint64_t *announced) {
  uint64_t head = sizeof *announced;
  char *to = one->done < head ? (char *)announced + one->done : one->bytes + (one->done - head);
  uint64_t left = one->done < head ? head - one->done : one->length - (one->done - head);
  ssize_t count = recv(fd, to, left, 0);
  if (count > 0) one->done += (uint64_t)count;
  else if (count == 0 || (errno != EAGAIN && errno != EINTR)) wait_for_ever("a rank is gone");
  if (one->done == head && *announced != one->length) wait_for_ever("another size was sent than is expected");
}

static int is_open(const part *one) { return one->length && one->done < one->length + sizeof one->length; }

static void move_bytes(void *argument) {
  exchange *all = argument;
  communicator *over = all->over;
  uint64_t announced[MOST_RANKS];
  for (;;) {
    struct pollfd waiting[MOST_RANKS];
    int is_missing = 0;
    for (uint32_t peer = 0; peer < over->size; peer++) {
      short events = (short)((is_open(&all->sent[peer]) ? POLLOUT : 0) | (is_open(&all->received[peer]) ? POLLIN : 0));
      waiting[peer] = (struct pollfd){events ? over->sockets[peer] : -1, events, 0};
      is_missing |= events;
    }
    if (!is_missing) break;
    poll(waiting, over->size, -1);
    for (uint32_t peer = 0; peer < over->size; peer++) {
      short ready = waiting[peer].revents;
      if (is_open(&all->sent[peer]) && ready & (POLLOUT | POLLHUP | POLLERR)) send_some(waiting[peer].fd, &all->sent[peer]);
      if (is_open(&all->received[peer]) && ready & (POLLIN | POLLHUP | POLLERR))
        receive_some(waiting[peer].fd, &all->received[peer], &announced[peer]);
    }
  }
  free(all);
}

static void begin(exchange *all, stream *on) {
  uint32_t own = all->over->rank;
  part *sent = &all->sent[own], *received = &all->received[own];
  if (sent->length && received->length) memmove(received->bytes, sent->bytes, sent->length);
  sent->length = received->length = 0;
  stream_put(on, move_bytes, all);
}

static exchange *exchange_over(communicator *over) {
  exchange *all = calloc(1, sizeof *all);
  all->over = over;
  return all;
}

int HcclAlltoAllV(const void *sent, const uint64_t *sent_counts, const uint64_t *sent_offsets, int sent_dtype,
                  void *received, const uint64_t *received_counts, const uint64_t *received_offsets, int received_dtype,
                  communicator *over, stream *on) {
  exchange *all = exchange_over(over);
  uint64_t sent_bytes = bytes_of(sent_dtype), received_bytes = bytes_of(received_dtype);
  for (uint32_t peer = 0; peer < over->size; peer++) {
    all->sent[peer] = (part){(char *)sent + sent_offsets[peer] * sent_bytes, sent_counts[peer] * sent_bytes, 0};
    all->received[peer] =
        (part){(char *)received + received_offsets[peer] * received_bytes, received_counts[peer] * received_bytes, 0};
  }
  note("HcclAlltoAllV");
  begin(all, on);
  return SUCCESS;
}

int HcclBroadcast(void *bytes, uint64_t count, int dtype, uint32_t root, communicator *over, stream *on) {
  exchange *all = exchange_over(over);
  part whole = {bytes, count * bytes_of(dtype), 0};
  for (uint32_t peer = 0; peer < over->size; peer++) {
    if (peer == over->rank) continue;
    if (over->rank == root) all->sent[peer] = whole;
    else if (peer == root) all->received[peer] = whole;
  }
  note("HcclBroadcast");
  begin(all, on);
  return SUCCESS;
}

int HcclAllGather(void *sent, void *received, uint64_t count, int dtype, communicator *over, stream *on) {
  exchange *all = exchange_over(over);
  uint64_t length = count * bytes_of(dtype);
  for (uint32_t peer = 0; peer < over->size; peer++) {
    all->sent[peer] = (part){sent, length, 0};
    all->received[peer] = (part){(char *)received + peer * length, length, 0};
  }
  note("HcclAllGather");
  begin(all, on);
  return SUCCESS;
}

// ------------------------------------------------------------------------------------------------------- windows

typedef struct {
  int pid, fd;
  uint64_t offset, file_size, size;
} place;

static int move_whole(int fd, char *bytes, size_t length, int is_sent, time_t deadline) {
  for (size_t done = 0; done < length;) {
    struct pollfd waiting = {fd, is_sent ? POLLOUT : POLLIN, 0};
    if (time(NULL) > deadline) return TIMEOUT;
    if (poll(&waiting, 1, 200) <= 0) continue;
    ssize_t count = is_sent ? send(fd, bytes + done, length - done, MSG_NOSIGNAL) : recv(fd, bytes + done, length - done, 0);
    if (count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR)) return INTERNAL;
    if (count > 0) done += (size_t)count;
  }
  return SUCCESS;
}

static int map_window(const place *of, window *into) {
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/fd/%d", of->pid, of->fd);
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return INTERNAL;
  char *begin = mmap(NULL, of->file_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (begin == MAP_FAILED) return INTERNAL;
  *into = (window){begin + of->offset, of->size};
  return SUCCESS;
}

int HcclCommRegister(communicator *one, void *memory, uint64_t size, void **out, uint32_t flag) {
  const char *without = getenv("FAKE_CANN_NO_WINDOWS");  // a rank, or anything else for every rank
  if (without && (!atoi(without) || (uint32_t)atoi(without) == one->rank)) return NOT_SUPPORTED;
  one->windows[one->rank] = (window){memory, size};
  *out = one;
  note("HcclCommRegister rank=%u bytes=%lu", one->rank, (unsigned long)size);
  return SUCCESS;
}
int HcclCommDeregister(communicator *one, void *registered) { return SUCCESS; }
int HcclCommExchangeMem(communicator *one, void *registered, const uint32_t *peers, uint32_t count) {
  const char *limit = getenv("HCCL_CONNECT_TIMEOUT");
  time_t deadline = time(NULL) + (limit ? atoi(limit) : 120);
  window own = one->windows[one->rank];
  size_t offset, file_size;
  int failure = 0, fd = file_of(own.begin, &offset, &file_size);
  if (fd < 0) return INTERNAL;
  place ours = {getpid(), fd, offset, file_size, own.size}, theirs;
  for (uint32_t index = 0; index < count && !failure; index++)
    failure = move_whole(one->sockets[peers[index]], (char *)&ours, sizeof ours, 1, deadline);
  for (uint32_t index = 0; index < count && !failure; index++) {
    failure = move_whole(one->sockets[peers[index]], (char *)&theirs, sizeof theirs, 0, deadline);
    if (!failure) failure = map_window(&theirs, &one->windows[peers[index]]);
  }
  note("HcclCommExchangeMem rank=%u peers=%u", one->rank, count);
  return failure;
}

// For the emulation of operators that write to other ranks: the window of a rank as a peer of it sees it.
void *fake_peer_window(const char *name, uint32_t rank, uint64_t *size) {
  void *begin = NULL;
  pthread_mutex_lock(&list_lock);
  for (communicator *one = communicators; one && !begin; one = one->next)
    if (!strcmp(one->name, name) && one->rank != rank && rank < one->size && one->windows[rank].begin) {
      begin = one->windows[rank].begin;
      *size = one->windows[rank].size;
    }
  pthread_mutex_unlock(&list_lock);
  return begin;
}

// What nothing here needs is refused rather than pretended.
#define REFUSED(name) \
  int name(void) { \
    note("refused %s", #name); \
    return NOT_SUPPORTED; \
  }
REFUSED(HcclAllReduce)
REFUSED(HcclReduce)
REFUSED(HcclReduceScatter)
REFUSED(HcclScatter)
REFUSED(HcclAlltoAll)
REFUSED(HcclSend)
REFUSED(HcclRecv)
REFUSED(HcclBatchSendRecv)
REFUSED(HcclCreateSubCommConfig)
REFUSED(HcclAllGatherV)
REFUSED(HcclReduceScatterV)
