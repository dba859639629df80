// A CANN for a machine without an NPU: what the parts of it share.
//
// Device memory is host memory, a stream is a queue that is carried out in order, and HCCL moves bytes between
// processes. No operator computes anything: that is done in Python (see tests/npu/cpu_mode.py).
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef struct stream stream;

// Carry out `run(argument)` after everything that was put on the stream before. It owns the argument.
void stream_put(stream *on, void (*run)(void *), void *argument);

// The file in which device memory lies, -1 where it is none; its place there and the size of the file.
int file_of(const void *memory, size_t *offset, size_t *size);

// Write a line to the file that FAKE_CANN_LOG names, if it names one.
void note(const char *format, ...);
