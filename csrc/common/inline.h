// Code that is compiled for the processor of the function which calls it.
#pragma once

#define IRESNET_FAST_INLINE inline __attribute__((always_inline))
