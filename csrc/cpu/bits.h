// Dense bit streams of a row: codes of 1 to 8 bits, one per byte, to packed bytes and back (layouts/bits.py).
#pragma once

#include "vec.h"

namespace ms::MS_LEVEL {

// Eight codes of `bits` bits from the bytes of a word to its low 8 * bits bits, by halves.
MS_INLINE uint64_t squeeze(uint64_t word, int bits) {
#if defined(MS_X512) || defined(MS_X256)
  return _pext_u64(word, 0x0101010101010101u * ((1u << bits) - 1));
#else
  const int gap = 8 - bits;
  const uint64_t one = ((1ull << bits) - 1) * 0x0001000100010001ull, two = ((1ull << 2 * bits) - 1) * 0x100000001ull;
  word = (word & one) | (word >> gap & one << bits);
  word = (word & two) | (word >> 2 * gap & two << 2 * bits);
  return (word & 0xFFFFFFFFull) | word >> 32 << (4 * bits);
#endif
}
MS_INLINE uint64_t spread(uint64_t word, int bits) {
#if defined(MS_X512) || defined(MS_X256)
  return _pdep_u64(word, 0x0101010101010101u * ((1u << bits) - 1));
#else
  const int gap = 8 - bits;
  const uint64_t one = ((1ull << bits) - 1) * 0x0001000100010001ull, two = ((1ull << 2 * bits) - 1) * 0x100000001ull;
  const uint64_t four = (1ull << 4 * bits) - 1;
  word = (word & four) | (word >> 4 * bits & four) << 32;
  word = (word & two) | (word & two << 2 * bits) << 2 * gap;
  return (word & one) | (word & one << bits) << gap;
#endif
}

MS_INLINE uint64_t load_bytes(const uint8_t* from, int count) {
  uint64_t word = 0;
  for (int i = 0; i < count; ++i) word |= static_cast<uint64_t>(from[i]) << (8 * i);
  return word;
}
MS_INLINE void store_bytes(uint8_t* to, uint64_t word, int count) {
  for (int i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(word >> (8 * i));
}

// How many of the groups can move eight bytes at once without touching a byte past the last group.
template <int kBits>
MS_INLINE int64_t wide_groups(int64_t groups) {
  return kBits * groups >= 8 ? (kBits * groups - 8) / kBits + 1 : 0;
}

template <int kBits>
inline void pack_words(const uint8_t* codes, int64_t groups, uint8_t* packed) {
  const int64_t wide = wide_groups<kBits>(groups);
  uint64_t word;
  for (int64_t g = 0; g < groups; ++g) {
    __builtin_memcpy(&word, codes + 8 * g, 8);
    word = squeeze(word, kBits);
    if (g < wide)
      __builtin_memcpy(packed + kBits * g, &word, 8);  // the bytes past these are written by the next groups
    else
      store_bytes(packed + kBits * g, word, kBits);
  }
}
template <int kBits>
inline void unpack_words(const uint8_t* packed, int64_t groups, uint8_t* codes) {
  const int64_t wide = wide_groups<kBits>(groups);
  uint64_t word;
  for (int64_t g = 0; g < groups; ++g) {
    if (g < wide)
      __builtin_memcpy(&word, packed + kBits * g, 8);
    else
      word = load_bytes(packed + kBits * g, kBits);
    word = spread(word, kBits);
    __builtin_memcpy(codes + 8 * g, &word, 8);
  }
}

inline int64_t pack_nibbles(const uint8_t* codes, int64_t count, uint8_t* packed) {
  int64_t i = 0;
#if defined(__SSE2__)
  const __m128i low = _mm_set1_epi16(0x00FF);
  for (; i + 32 <= count; i += 32) {
    __m128i a = _mm_loadu_si128((const __m128i*)(codes + i)), b = _mm_loadu_si128((const __m128i*)(codes + i + 16));
    a = _mm_and_si128(_mm_or_si128(a, _mm_srli_epi16(a, 4)), low);
    b = _mm_and_si128(_mm_or_si128(b, _mm_srli_epi16(b, 4)), low);
    _mm_storeu_si128((__m128i*)(packed + i / 2), _mm_packus_epi16(a, b));
  }
#endif
  return i;
}
inline int64_t unpack_nibbles(const uint8_t* packed, int64_t count, uint8_t* codes) {
  int64_t i = 0;
#if defined(__SSE2__)
  const __m128i mask = _mm_set1_epi8(15);
  for (; i + 32 <= count; i += 32) {
    const __m128i both = _mm_loadu_si128((const __m128i*)(packed + i / 2));
    const __m128i low = _mm_and_si128(both, mask), high = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
    _mm_storeu_si128((__m128i*)(codes + i), _mm_unpacklo_epi8(low, high));
    _mm_storeu_si128((__m128i*)(codes + i + 16), _mm_unpackhi_epi8(low, high));
  }
#endif
  return i;
}

// Groups of 8 codes by width; the widths are template arguments so that shifts and masks are constants.
inline void pack_groups(const uint8_t* codes, int64_t groups, int bits, uint8_t* packed) {
  switch (bits) {
    case 1: return pack_words<1>(codes, groups, packed);
    case 2: return pack_words<2>(codes, groups, packed);
    case 3: return pack_words<3>(codes, groups, packed);
    case 4: return pack_words<4>(codes, groups, packed);
    case 5: return pack_words<5>(codes, groups, packed);
    case 6: return pack_words<6>(codes, groups, packed);
    default: return pack_words<7>(codes, groups, packed);
  }
}
inline void unpack_groups(const uint8_t* packed, int64_t groups, int bits, uint8_t* codes) {
  switch (bits) {
    case 1: return unpack_words<1>(packed, groups, codes);
    case 2: return unpack_words<2>(packed, groups, codes);
    case 3: return unpack_words<3>(packed, groups, codes);
    case 4: return unpack_words<4>(packed, groups, codes);
    case 5: return unpack_words<5>(packed, groups, codes);
    case 6: return unpack_words<6>(packed, groups, codes);
    default: return unpack_words<7>(packed, groups, codes);
  }
}

// Pack `count` codes; writes (count * bits + 7) / 8 bytes, the bits after the last code are zero.
inline void pack_codes(const uint8_t* codes, int64_t count, int bits, uint8_t* packed) {
  if (bits == 8) {
    if (codes != packed) __builtin_memcpy(packed, codes, static_cast<size_t>(count));
    return;
  }
  int64_t done = bits == 4 ? pack_nibbles(codes, count, packed) : 0;
  const int64_t groups = (count - done) / 8;
  pack_groups(codes + done, groups, bits, packed + done / 8 * bits);
  done += 8 * groups;
  if (done < count) {
    uint8_t last[8] = {};
    for (int64_t i = done; i < count; ++i) last[i - done] = codes[i];
    uint64_t word;
    __builtin_memcpy(&word, last, 8);
    store_bytes(packed + done / 8 * bits, squeeze(word, bits), static_cast<int>(((count - done) * bits + 7) / 8));
  }
}

// Unpack `count` codes; reads (count * bits + 7) / 8 bytes.
inline void unpack_codes(const uint8_t* packed, int64_t count, int bits, uint8_t* codes) {
  if (bits == 8) {
    __builtin_memcpy(codes, packed, static_cast<size_t>(count));
    return;
  }
  int64_t done = bits == 4 ? unpack_nibbles(packed, count, codes) : 0;
  const int64_t groups = (count - done) / 8;
  unpack_groups(packed + done / 8 * bits, groups, bits, codes + done);
  done += 8 * groups;
  if (done < count) {
    const int bytes = static_cast<int>(((count - done) * bits + 7) / 8);
    const uint64_t word = spread(load_bytes(packed + done / 8 * bits, bytes), bits);
    uint8_t last[8];
    __builtin_memcpy(last, &word, 8);
    for (int64_t i = done; i < count; ++i) codes[i] = last[i - done];
  }
}

}  // namespace ms::MS_LEVEL
