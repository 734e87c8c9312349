/* Loaded into a process before its libraries: system calls that fail, take their time or tell another time.
 *
 * What happens is said by a file named by FAULT_CONTROL, which the test maps and writes while the process runs
 * (see shim.py for its layout). Reads are those of staging: preadv and sendfile; nothing else in the processes
 * uses them. Clocks: only CLOCK_REALTIME moves, and waits until a time of that clock move with it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
  int32_t read_errors;      /* of a hundred reads */
  int32_t read_delay_ms;    /* the longest; each takes a random part of it, or until this is 0 */
  int32_t no_space;         /* whether memory for frames runs out ... */
  int32_t allocations_left; /* ... after so many more */
  int64_t clock_offset;     /* seconds */
};

static struct control calm;
static volatile struct control *control = &calm;
static _Thread_local unsigned seed;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

__attribute__((constructor)) static void attach(void) {
  const char *path = getenv("FAULT_CONTROL");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *mapped = mmap(NULL, sizeof(struct control), PROT_READ, MAP_SHARED, file, 0);
  if (mapped != MAP_FAILED) control = mapped;
  close(file);
}

static unsigned draw(unsigned below) {
  if (!seed) seed = (unsigned)(syscall(SYS_gettid) ^ (uintptr_t)&seed ^ clock());
  return (unsigned)rand_r(&seed) % below;
}

static int read_fails(void) {
  for (unsigned left = draw((unsigned)control->read_delay_ms + 1); left && control->read_delay_ms; left--) usleep(1000);
  if ((int)draw(100) >= control->read_errors) return 0;
  errno = EIO;
  return 1;
}

static int space_is_out(void) {
  static int allocations;
  if (!control->no_space) {
    allocations = 0;
    return 0;
  }
  return __atomic_add_fetch(&allocations, 1, __ATOMIC_RELAXED) > control->allocations_left;
}

/* Which of the two Python calls depends on the C library it was built with. */
ssize_t preadv64(int file, const struct iovec *parts, int count, off64_t position) {
  return read_fails() ? -1 : REAL(preadv64)(file, parts, count, position);
}

ssize_t preadv64v2(int file, const struct iovec *parts, int count, off64_t position, int flags) {
  return read_fails() ? -1 : REAL(preadv64v2)(file, parts, count, position, flags);
}

ssize_t sendfile64(int to, int from, off64_t *position, size_t count) {
  if (space_is_out()) {
    errno = ENOSPC;
    return -1;
  }
  return read_fails() ? -1 : REAL(sendfile64)(to, from, position, count);
}

int posix_fallocate64(int file, off64_t position, off64_t count) {
  return space_is_out() ? ENOSPC : REAL(posix_fallocate64)(file, position, count);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  static __typeof__(&clock_gettime) plain;
  if (!plain) plain = REAL(clock_gettime);
  int result = plain(clock, now);
  if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += control->clock_offset;
  return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  int result = (int)syscall(SYS_gettimeofday, now, zone);
  now->tv_sec += control->clock_offset;
  return result;
}

time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}

/* The kernel waits by its own clock. A time of the monotonic clock is less than a billion seconds. */
static struct timespec unmoved(const struct timespec *until) {
  struct timespec result = *until;
  if (result.tv_sec > 1000000000) result.tv_sec -= control->clock_offset;
  return result;
}

int pthread_cond_timedwait(pthread_cond_t *restrict changed, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
  struct timespec moved = unmoved(until);
  return REAL(pthread_cond_timedwait)(changed, mutex, &moved);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
  struct timespec moved = unmoved(until);
  return REAL(sem_timedwait)(semaphore, &moved);
}
