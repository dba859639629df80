// Descriptions of tensors, and operators that do nothing: what torch_npu calls once its own checks have passed.
#include "fake.h"
#include <stdlib.h>

static void *handle(void) { return calloc(1, 64); }
static int release(void *one) {
  free(one);
  return 0;
}

void *aclCreateTensor(const int64_t *shape, uint64_t num_dims, int dtype, const int64_t *strides, int64_t offset,
                      int format, const int64_t *storage_shape, uint64_t num_storage_dims, void *memory) {
  return handle();
}
void *aclCreateTensorList(void *const *tensors, uint64_t count) { return handle(); }
void *aclCreateIntArray(const int64_t *values, uint64_t count) { return handle(); }
void *aclCreateBoolArray(const char *values, uint64_t count) { return handle(); }
void *aclCreateFloatArray(const float *values, uint64_t count) { return handle(); }
void *aclCreateScalar(void *value, int dtype) { return handle(); }
void *aclCreateScalarList(void *const *values, uint64_t count) { return handle(); }
void *aclCreateTensorDesc(void) { return handle(); }
void *aclCreateDataBuffer(void) { return handle(); }
void *aclopCreateAttr(void) { return handle(); }
int aclDestroyTensor(void *one) { return release(one); }
int aclDestroyTensorList(void *one) { return release(one); }
int aclDestroyIntArray(void *one) { return release(one); }
int aclDestroyBoolArray(void *one) { return release(one); }
int aclDestroyFloatArray(void *one) { return release(one); }
int aclDestroyScalar(void *one) { return release(one); }
int aclDestroyScalarList(void *one) { return release(one); }
size_t aclGetCompileoptSize(int option) { return 256; }
int aclGetCompileopt(int option, char *value, size_t size) {
  if (size) value[0] = 0;
  return 0;
}

// filled.inc has every other symbol that the package mentions: OPERATOR for aclnn operators, REST for the rest.
#define OPERATOR(name) \
  int name(void) { \
    note("%s", #name); \
    return 0; \
  }
#define REST(name) \
  long name(void) { return 0; }
#include "filled.inc"
