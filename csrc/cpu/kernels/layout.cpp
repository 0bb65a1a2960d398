// From row_major to the layout rows16: the codes of 16 rows side by side, cut into bit planes.
//
// The layout is stated in src/microscale/layouts/rows16.py. A group of 16 rows at a time is spread to one byte for each
// code, the largest elements of MX+ and MX++ are taken out, and each chunk of 32 columns is written plane by plane.
#include <cstdlib>

#include "kernels.h"
#include "vec.h"

namespace ms::MS_LEVEL {
namespace {

constexpr int kRows = 16;
constexpr int kChunk = 32;
static_assert(kRows % W == 0);

// Spreads `count` codes of a dense bit stream, 8 codes in BITS bytes; reads no byte past `bytes`.
template <int BITS>
void spread(const uint8_t* from, int64_t bytes, int64_t count, uint8_t* to) {
  constexpr uint64_t mask = (uint64_t{1} << BITS) - 1;
  for (int64_t i = 0; i < count; i += 8) {
    const int64_t at = i / 8 * BITS;
    uint64_t word = 0;
    if (at + 8 <= bytes) {
      __builtin_memcpy(&word, from + at, 8);
    } else {
      for (int64_t byte = 0; byte < BITS && at + byte < bytes; ++byte)
        word |= uint64_t{from[at + byte]} << (8 * byte);
    }
    const int there = count - i < 8 ? static_cast<int>(count - i) : 8;
    if (there == 8) {
      uint64_t codes = 0;
      for (int k = 0; k < 8; ++k) codes |= (word >> (BITS * k) & mask) << (8 * k);
      __builtin_memcpy(to + i, &codes, 8);
    } else {
      for (int k = 0; k < there; ++k) to[i + k] = static_cast<uint8_t>(word >> (BITS * k) & mask);
    }
  }
}

// Every second of 8 bytes.
MS_INLINE uint32_t every_second(uint64_t bytes) {
  bytes &= 0x00FF00FF00FF00FFull;
  bytes = (bytes | bytes >> 8) & 0x0000FFFF0000FFFFull;
  return static_cast<uint32_t>(bytes | bytes >> 16);
}

// Writes the planes of a chunk; `lanes` holds, for each q = 2 o + f, the dwords of 16 rows with bytes b.
template <int WIDTH>
MS_INLINE uint32_t* write_plane(const uint32_t (*lanes)[kRows], int shift, uint32_t* to) {
  constexpr uint32_t mask = ((1u << WIDTH) - 1) * 0x01010101u;
  constexpr int fields = 8 / WIDTH;
  for (int dword = 0; dword < WIDTH; ++dword, to += kRows) {
    for (int row = 0; row < kRows; row += W) {
      U sum = {};
      for (int field = 0; field < fields; ++field)
        sum |= ((load<U>(lanes[dword * fields + field] + row) >> shift) & set1u(mask)) << (WIDTH * field);
      store(to + row, sum);
    }
  }
  return to;
}

template <int BITS>
MS_INLINE void write_chunk(const uint8_t* codes, int64_t stride, uint32_t* to) {
  alignas(64) uint32_t lanes[8][kRows];
  for (int row = 0; row < kRows; ++row) {
    for (int o = 0; o < 4; ++o) {
      uint64_t bytes;
      __builtin_memcpy(&bytes, codes + row * stride + 8 * o, 8);
      lanes[2 * o][row] = every_second(bytes);
      lanes[2 * o + 1][row] = every_second(bytes >> 8);
    }
  }
  if constexpr (BITS == 8) {
    __builtin_memcpy(to, lanes, sizeof lanes);
  } else {
    int shift = 0;
    if constexpr (BITS >= 4) to = write_plane<4>(lanes, shift, to), shift += 4;
    if constexpr (BITS % 4 >= 2) to = write_plane<2>(lanes, shift, to), shift += 2;
    if constexpr (BITS % 2 == 1) write_plane<1>(lanes, shift, to);
  }
}

// Takes the largest element of each block out of a row; see layouts/largest.py.
void split_row(const LayoutArgs& args, int64_t row, uint8_t* codes) {
  const int top = 1 << args.magnitude_bits, mask = top - 1;
  for (int64_t block = 0; block < args.grid_cols; ++block) {
    const int64_t first = block * args.block_size;
    const uint8_t place = args.place[row * args.grid_cols + block];
    uint8_t& side = args.side[row * args.grid_cols + block];
    side = 0;
    if (place == args.zero_block) {
      const int64_t end = first + args.block_size < args.cols ? first + args.block_size : args.cols;
      for (int64_t i = first; i < end; ++i) codes[i] = 0;
      continue;
    }
    if (place >= args.block_size || first + place >= args.cols) continue;
    const int raw = codes[first + place];
    if (!args.is_compact) {
      side = static_cast<uint8_t>(raw);
      codes[first + place] = 0;
      continue;
    }
    const int magnitude = args.first_code + ((raw & mask) >> args.low_bits);
    const int sign = raw & top;
    const int in_place = !args.is_int ? (magnitude | sign) : sign ? (-magnitude & (2 * top - 1)) : magnitude;
    codes[first + place] = static_cast<uint8_t>(in_place);
    side = static_cast<uint8_t>((raw & ((1 << args.low_bits) - 1)) | (sign ? 1 << args.low_bits : 0));
  }
}

template <int BITS>
void pack_group(const LayoutArgs& args, int64_t group, uint8_t* scratch) {
  const int64_t chunks = (args.cols + kChunk - 1) / kChunk, stride = chunks * kChunk;
  uint8_t* to = args.packed + group * chunks * 4 * kRows * BITS;
  for (int64_t lane = 0; lane < kRows; ++lane) {
    const int64_t row = group * kRows + lane;
    uint8_t* codes = scratch + lane * stride;
    if (row >= args.rows) {
      __builtin_memset(codes, 0, stride);
      continue;
    }
    spread<BITS>(args.codes + row * args.row_bytes, args.row_bytes, args.cols, codes);
    __builtin_memset(codes + args.cols, 0, stride - args.cols);
    if (args.place != nullptr) split_row(args, row, codes);
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    alignas(64) uint32_t planes[kRows * BITS];
    write_chunk<BITS>(scratch + chunk * kChunk, stride, planes);
    __builtin_memcpy(to + chunk * sizeof planes, planes, sizeof planes);
    if (BITS == 8 && args.subnormals != nullptr) {
      U found = {}, special = {};
      for (int part = 0; part < kRows * BITS; part += W) {
        const B codes = as<B>(load<U>(planes + part)) & static_cast<uint8_t>(args.magnitude_mask);
        found |= as<U>((codes - 1) < static_cast<uint8_t>(args.num_mantissas - 1));  // 0 wraps around: no subnormal
        special |= as<U>(codes > static_cast<uint8_t>(args.max_code));
      }
      uint32_t any = 0, any_special = 0;
      for (int lane = 0; lane < W; ++lane) any |= found[lane], any_special |= special[lane];
      args.subnormals[group * chunks + chunk] = static_cast<uint8_t>((any != 0) | (any_special != 0) << 1);
    }
  }
}

// Nibbles keep their dwords: only their order changes.
void pack_nibbles(const LayoutArgs& args, int64_t group) {
  const int64_t chunks = args.cols / kChunk;
  uint8_t* to = args.packed + group * chunks * 4 * kRows * 4;
  const int64_t there = args.rows - group * kRows < kRows ? args.rows - group * kRows : kRows;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    alignas(64) uint32_t dwords[4][kRows] = {};
    for (int64_t lane = 0; lane < there; ++lane) {
      uint32_t own[4];
      __builtin_memcpy(own, args.codes + (group * kRows + lane) * args.row_bytes + chunk * 16, 16);
      for (int o = 0; o < 4; ++o) dwords[o][lane] = own[o];
    }
    __builtin_memcpy(to + chunk * sizeof dwords, dwords, sizeof dwords);
  }
}

bool pack_rows16(const LayoutArgs& args, int64_t group) {
  if (args.bits == 4 && args.place == nullptr && args.cols % kChunk == 0) {
    pack_nibbles(args, group);
    return true;
  }
  const int64_t stride = (args.cols + kChunk - 1) / kChunk * kChunk;
  uint8_t* scratch = static_cast<uint8_t*>(std::malloc(kRows * stride + 1));
  if (scratch == nullptr) return false;
  switch (args.bits) {
    case 2: pack_group<2>(args, group, scratch); break;
    case 3: pack_group<3>(args, group, scratch); break;
    case 4: pack_group<4>(args, group, scratch); break;
    case 5: pack_group<5>(args, group, scratch); break;
    case 6: pack_group<6>(args, group, scratch); break;
    case 7: pack_group<7>(args, group, scratch); break;
    default: pack_group<8>(args, group, scratch); break;
  }
  std::free(scratch);
  return true;
}

}  // namespace

extern const LayoutKernels layout_kernels;
const LayoutKernels layout_kernels = {pack_rows16};

}  // namespace ms::MS_LEVEL
