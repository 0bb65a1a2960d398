// Everything about codes that kernels share: numbers, scales, encoding and decoding of rows, bit streams.
#pragma once

#include "bits.h"
#include "decode.h"
#include "encode.h"
