// Code that is compiled for the processor of the function which calls it.
#pragma once

// Before a function; and behind the parameters of a lambda.
#define IRESNET_FAST_INLINE inline __attribute__((always_inline))
#define IRESNET_FAST_INLINED __attribute__((always_inline))
