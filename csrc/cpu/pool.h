// Threads that wait for work: a loop over chunks, shared out between them.
//
// parallel_for(chunks, threads, body) calls body(context, chunk) for every chunk from 0 on, each once, on up to
// `threads` threads, the calling one included. Which thread takes which chunk is open, so a chunk's result must not
// depend on it. Calls from several threads at once are safe: only one of them gets the workers, the others run alone.
// After fork the child starts without workers and makes its own.
#pragma once

#include <cstdint>

namespace ms {

using ChunkBody = void (*)(const void* context, int64_t chunk);

void parallel_for(int64_t chunks, int threads, ChunkBody body, const void* context);

template <class Body>
void parallel(int64_t chunks, int threads, const Body& body) {
  parallel_for(
      chunks, threads, [](const void* context, int64_t chunk) { (*static_cast<const Body*>(context))(chunk); }, &body);
}

}  // namespace ms
