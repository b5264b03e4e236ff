// The parts of a sparse step for which torch has no fast kernel on a CPU. See cpu.py.
//
// A tile holds the encoder's product without the bias. The bias is added here, in float, because a bfloat16 sum is
// rounded, and because a product that adds the bias takes a tenth longer. Sums are compared as integers of the same
// order, so that no option of the compiler can change a choice. NaN is larger than every number, as in torch.topk.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

using Index = int64_t;

template <class To, class From> static inline To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From), "a number's bits fill the other one");
    To out;
    std::memcpy(&out, &x, sizeof out);
    return out;
}

// The numbers of a tile: as stored, as added (Float), and as compared (Key).
struct BFloat16 {
    using Stored = uint16_t;
    using Float = float;
    using Key = int32_t;
    static inline Float value(Stored x) { return bits_as<float>(static_cast<uint32_t>(x) << 16); }
};
struct Float32 {
    using Stored = float;
    using Float = float;
    using Key = int32_t;
    static inline Float value(Stored x) { return x; }
};
struct Float64 {
    using Stored = double;
    using Float = double;
    using Key = int64_t;
    static inline Float value(Stored x) { return x; }
};

// An integer in the order of the floats: their bits, and for a negative float all bits but the sign flipped.
template <class Number> static inline typename Number::Key key_of(typename Number::Float x) {
    using Key = typename Number::Key;
    const Key bits = bits_as<Key>(x);
    if (x != x) return std::numeric_limits<Key>::max();  // NaN, of either sign
    return bits ^ ((bits >> (8 * sizeof(Key) - 1)) & std::numeric_limits<Key>::max());
}

// ------------------------------------------------------------------------------------------------- k of each row

// The k-th largest of n keys, by bisection. The compiler vectorises the counting, and there are no branches for the
// processor to mispredict; std::nth_element of so few numbers takes twice as long because of them.
template <class Key> static Key kth_largest(const Key* keys, Index n, Index k) {
    Key low = std::numeric_limits<Key>::min(), high = std::numeric_limits<Key>::max();
    while (low < high) {
        const Key middle = (low >> 1) + (high >> 1) + ((low | high) & 1);  // of low and high, rounded up
        Key count = 0;
        for (Index i = 0; i < n; i++) count += keys[i] >= middle;
        if (count >= k) low = middle; else high = middle - 1;
    }
    return low;
}

template <class Key> struct Candidate {
    Key key;
    int32_t place;
    bool operator<(const Candidate& other) const {  // the larger number first, of equal ones the earlier place
        return key != other.key ? key > other.key : place < other.place;
    }
};

// The number of groups (places j, j + n_groups, j + 2 n_groups, ...) of a row: few, so that the k-th largest of their
// maxima is found quickly, but at least 4 k and 256. Never more than there are numbers.
static Index n_groups_for(Index n, Index k) {
    Index n_groups = 256;
    while (n_groups < 4 * k) n_groups *= 2;
    return std::min(n, n_groups);
}

// Memory of one thread.
template <class Number> struct Scratch {
    std::vector<typename Number::Key> maxima;
    std::vector<Candidate<typename Number::Key>> candidates;
    Scratch(Index n, Index n_groups) : maxima(n_groups), candidates(n + 1) {}
};

// The k largest numbers are no smaller than the k-th largest of the groups' maxima, and lie in groups whose maxima are
// no smaller either.
template <class Number>
static void top_k_of_row(
    const typename Number::Stored* row, const typename Number::Float* bias, Index n, Index k, Scratch<Number>& scratch,
    Index* out
) {
    using Key = typename Number::Key;
    const Index n_groups = scratch.maxima.size();
    Key* maxima = scratch.maxima.data();
    auto* candidates = scratch.candidates.data();

    for (Index g = 0; g < n_groups; g++) maxima[g] = key_of<Number>(Number::value(row[g]) + bias[g]);
    for (Index start = n_groups; start < n; start += n_groups) {
        const Index size = std::min(n_groups, n - start);
        for (Index g = 0; g < size; g++) {
            const Key key = key_of<Number>(Number::value(row[start + g]) + bias[start + g]);
            maxima[g] = key > maxima[g] ? key : maxima[g];
        }
    }
    const Key limit = kth_largest(maxima, n_groups, k);
    Index found = 0;
    for (Index g = 0; g < n_groups; g++) {
        if (maxima[g] < limit) continue;
        for (Index i = g; i < n; i += n_groups) {
            const Key key = key_of<Number>(Number::value(row[i]) + bias[i]);
            candidates[found] = {key, static_cast<int32_t>(i)};
            found += key >= limit;
        }
    }
    std::nth_element(candidates, candidates + (k - 1), candidates + found);
    for (Index i = 0; i < k; i++) out[i] = candidates[i].place;
}

// out[row * k] to out[row * k + k - 1]: places of the k largest sums of the row.
template <class Number>
static void top_k(
    const typename Number::Stored* tile, Index n_rows, Index n, const typename Number::Float* bias, Index k,
    int n_threads, Index* out
) {
#pragma omp parallel num_threads(n_threads)
    {
        Scratch<Number> scratch(n, n_groups_for(n, k));
#pragma omp for schedule(static)
        for (Index row = 0; row < n_rows; row++) top_k_of_row<Number>(tile + row * n, bias, n, k, scratch, out + row * k);
    }
}

// ------------------------------------------------------------------------------------------------ by a threshold

constexpr Index BLOCK = 64;

// is_above[i] = 1 or 0 for each of the `size` numbers of a block.
template <class Number>
static inline void compare(
    const typename Number::Stored* block, const typename Number::Float* limits, Index size, uint8_t* is_above
) {
    for (Index i = 0; i < size; i++) is_above[i] = Number::value(block[i]) > limits[i];
}

// offsets[row + 1] = how many numbers of the row are above the limit of their place.
template <class Number>
static void count_above(
    const typename Number::Stored* tile, Index n_rows, Index n, const typename Number::Float* limits, int n_threads,
    Index* offsets
) {
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (Index row = 0; row < n_rows; row++) {
        Index count = 0;
        for (Index start = 0; start < n; start += BLOCK) {
            uint8_t is_above[BLOCK] = {0}, in_block = 0;
            compare<Number>(tile + row * n + start, limits + start, std::min(BLOCK, n - start), is_above);
            for (uint8_t one : is_above) in_block += one;
            count += in_block;
        }
        offsets[row + 1] = count;
    }
}

// places[offsets[row]] and on: the places of the row's numbers above their limits, ascending.
template <class Number>
static void places_above(
    const typename Number::Stored* tile, Index n_rows, Index n, const typename Number::Float* limits, int n_threads,
    const Index* offsets, Index* places
) {
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (Index row = 0; row < n_rows; row++) {
        Index* out = places + offsets[row];
        for (Index start = 0; start < n; start += BLOCK) {
            uint8_t is_above[BLOCK] = {0};
            compare<Number>(tile + row * n + start, limits + start, std::min(BLOCK, n - start), is_above);
            for (Index word = 0; word < BLOCK; word += 8) {  // most words are 0
                uint64_t eight;
                std::memcpy(&eight, is_above + word, 8);
                if (eight == 0) continue;
                for (Index i = word; i < word + 8; i++)
                    if (is_above[i]) *out++ = start + i;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------- by latent

// order: the entries by ascending latent, in their old order within a latent. offsets (d_sae + 1): where each latent's
// entries begin in it.
extern "C" void sort_by_latent(const Index* latents, Index n, Index d_sae, Index* offsets, Index* order) {
    std::fill(offsets, offsets + d_sae + 1, 0);
    for (Index e = 0; e < n; e++) offsets[latents[e] + 1]++;
    for (Index i = 0; i < d_sae; i++) offsets[i + 1] += offsets[i];
    std::vector<Index> next(offsets, offsets + d_sae);
    for (Index e = 0; e < n; e++) order[next[latents[e]]++] = e;
}

// ----------------------------------------------------------------------------------------- products at the entries

// out[e] = rows[row e] . table[latent e]. The next entry's row of the table is prefetched, because the processor cannot
// predict which one it will be.
template <class Number>
static void row_products(
    const typename Number::Float* rows, const typename Number::Float* table, const Index* offsets,
    const Index* latents, Index n_rows, Index d, int n_threads, typename Number::Float* out
) {
    using Float = typename Number::Float;
    constexpr Index LANES = 256 / sizeof(Float), CACHE_LINE = 64 / sizeof(Float);
    const Index n = offsets[n_rows];
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (Index row = 0; row < n_rows; row++) {
        const Float* x = rows + row * d;
        for (Index e = offsets[row]; e < offsets[row + 1]; e++) {
            const Float* w = table + latents[e] * d;
            const Float* next = table + latents[std::min(e + 1, n - 1)] * d;
            for (Index i = 0; i < d; i += CACHE_LINE) __builtin_prefetch(next + i);
            Float sums[LANES] = {0}, sum = 0;
            Index i = 0;
            for (; i + LANES <= d; i += LANES)
                for (Index lane = 0; lane < LANES; lane++) sums[lane] += x[i + lane] * w[i + lane];
            for (; i < d; i++) sum += x[i] * w[i];
            // By halves: one after the other, the lanes would wait for each other for longer than the products take.
            for (Index half = LANES / 2; half > 0; half /= 2)
                for (Index lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
            out[e] = sums[0] + sum;
        }
    }
}

#define PRODUCTS_FOR(Number)                                                                                         \
    void row_products_##Number(                                                                                      \
        const Number::Float* rows, const Number::Float* table, const Index* offsets, const Index* latents,           \
        Index n_rows, Index d, int n_threads, Number::Float* out                                                     \
    ) { row_products<Number>(rows, table, offsets, latents, n_rows, d, n_threads, out); }

#define KERNELS_FOR(Number)                                                                                          \
    void top_k_##Number(                                                                                             \
        const Number::Stored* tile, Index n_rows, Index n, const Number::Float* bias, Index k, int n_threads,        \
        Index* out                                                                                                   \
    ) { top_k<Number>(tile, n_rows, n, bias, k, n_threads, out); }                                                   \
    void count_above_##Number(                                                                                       \
        const Number::Stored* tile, Index n_rows, Index n, const Number::Float* limits, int n_threads, Index* offsets \
    ) { count_above<Number>(tile, n_rows, n, limits, n_threads, offsets); }                                          \
    void places_above_##Number(                                                                                      \
        const Number::Stored* tile, Index n_rows, Index n, const Number::Float* limits, int n_threads,               \
        const Index* offsets, Index* places                                                                          \
    ) { places_above<Number>(tile, n_rows, n, limits, n_threads, offsets, places); }

extern "C" {
KERNELS_FOR(BFloat16)
KERNELS_FOR(Float32)
KERNELS_FOR(Float64)
PRODUCTS_FOR(Float32)
PRODUCTS_FOR(Float64)
}
