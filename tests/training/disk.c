/* Faults of a disk, put before libc by LD_PRELOAD: the n-th operation on what lies below a folder fails. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, FAILS, SHORT, VANISHES };

static char folder[4096];
static int mode = NONE, code = 0, reads = 0;
static long wanted = 0, seen = 0;

/* Count operations on the folder from now on; of them the n-th, and all after it, meet the fault. */
long disk_arm(const char *path, int fault, int error, long n, int of_reads) {
    long before = seen;
    strncpy(folder, path, sizeof folder - 1);
    mode = fault, code = error, wanted = n, seen = 0, reads = of_reads;
    return before;
}

static int is_inside(const char *path) {
    return folder[0] && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int is_open_inside(int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_inside(path);
}

/* Whether this operation meets the fault. */
static int strikes(int is_read) {
    if (is_read != reads) return 0;
    seen++;
    if (mode == NONE || !wanted || seen < wanted) return 0;
    if (mode == VANISHES) {
        if (seen == wanted) {
            static int (*move)(const char *, const char *);
            if (!move) move = dlsym(RTLD_NEXT, "rename");
            char gone[4200];
            snprintf(gone, sizeof gone, "%s.gone", folder);
            move(folder, gone);
        }
        return 0;
    }
    return 1;
}

#define REAL(name, type, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)
#define FAIL(inside, is_read) if ((inside) && strikes(is_read)) { errno = code; return -1; }

static ssize_t written(ssize_t (*real)(int, const void *, size_t), int file, const void *bytes, size_t count) {
    if (is_open_inside(file) && strikes(0)) {
        if (mode == SHORT && count > 1 && seen == wanted) return real(file, bytes, count / 2);
        errno = code;
        return -1;
    }
    return real(file, bytes, count);
}

ssize_t write(int file, const void *bytes, size_t count) {
    REAL("write", ssize_t, int, const void *, size_t);
    return written(real, file, bytes, count);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL("writev", ssize_t, int, const struct iovec *, int);
    FAIL(is_open_inside(file), 0)
    return real(file, parts, count);
}
ssize_t pwrite64(int file, const void *bytes, size_t count, off64_t at) {
    REAL("pwrite64", ssize_t, int, const void *, size_t, off64_t);
    FAIL(is_open_inside(file), 0)
    return real(file, bytes, count, at);
}
int fsync(int file) { REAL("fsync", int, int); FAIL(is_open_inside(file), 0) return real(file); }
int ftruncate64(int file, off64_t size) {
    REAL("ftruncate64", int, int, off64_t);
    FAIL(is_open_inside(file), 0)
    return real(file, size);
}
int posix_fallocate64(int file, off64_t at, off64_t size) {
    REAL("posix_fallocate64", int, int, off64_t, off64_t);
    if (is_open_inside(file) && strikes(0)) return code;
    return real(file, at, size);
}
int rename(const char *from, const char *to) {
    REAL("rename", int, const char *, const char *);
    FAIL(is_inside(from), 0)
    return real(from, to);
}
int mkdir(const char *path, mode_t permissions) {
    REAL("mkdir", int, const char *, mode_t);
    FAIL(is_inside(path), 0)
    return real(path, permissions);
}
#define OPEN(name)                                                   \
    int name(const char *path, int flags, ...) {                     \
        REAL(#name, int, const char *, int, ...);                    \
        va_list rest;                                                \
        va_start(rest, flags);                                       \
        mode_t permissions = flags & O_CREAT ? va_arg(rest, int) : 0;\
        va_end(rest);                                                \
        FAIL(is_inside(path), !(flags & (O_WRONLY | O_RDWR)))        \
        return real(path, flags, permissions);                       \
    }
OPEN(open)
OPEN(open64)
ssize_t read(int file, void *bytes, size_t count) {
    REAL("read", ssize_t, int, void *, size_t);
    FAIL(is_open_inside(file), 1)
    return real(file, bytes, count);
}
