// Weights that will be read soon.
#pragma once
#include "vectors.h"

namespace {

// Asks for those of some blocks later, on processors with AMX: these guess too late what is read while codes are
// decoded. Others read faster when left alone.
template <int BYTES>
ALWAYS void ahead([[maybe_unused]] const uint8_t* w) {
#ifdef __AMX_TILE__
    each<BYTES / 64>([&](auto i) HERE { _mm_prefetch((const char*)w + 2048 + 64 * i, _MM_HINT_T1); });
#endif
}

}  // namespace
