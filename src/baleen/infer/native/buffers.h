// Memory of a forward that lasts from step to step.
#pragma once

#include "matmul.h"

#include <cstdio>
#include <cstdlib>

// Grows and is never cleared; aligned to 64 bytes.
template <class T> class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    ~Buffer() { free(data_); }

    T* room(size_t count) {
        if (count > count_) {
            free(data_);
            data_ = (T*)aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
            if (!data_) fprintf(stderr, "baleen: out of memory\n"), abort();
            count_ = count;
        }
        return data_;
    }
    T* data() const { return data_; }

  private:
    T* data_ = nullptr;
    size_t count_ = 0;
};

// Rows that a packed matrix is multiplied by, rounded besides where it is one of integers. A row has zeros up to a
// multiple of 32 once `finish` was called for it.
class Activations {
  public:
    void shape(int rows, int in, bool is_rounded) {
        in_ = in, step_ = whole_blocks(std::max(1, in)), is_rounded_ = is_rounded;
        values_.room((size_t)rows * step_);
        if (is_rounded) rounded_.room((size_t)rows * step_), scales_.room((size_t)rows * step_ / BLOCK * 2);
    }

    long step() const { return step_; }
    float* row(int n) const { return values_.data() + n * step_; }

    void finish(int n) const {
        std::fill(row(n) + in_, row(n) + step_, 0.0f);
        if (is_rounded_) round_row(row(n), in_, rounded_.data() + n * step_, scales_.data() + n * step_ / BLOCK * 2);
    }

    // The same for inputs [32 * block, 32 * (block + 1)) alone.
    void finish_block(int n, int block) const {
        const int first = block * BLOCK;
        for (int k = std::max(first, in_); k < first + BLOCK; k++) row(n)[k] = 0;
        if (is_rounded_)
            round_row(row(n) + first, BLOCK, rounded_.data() + n * step_ + first, scales_.data() + (n * step_ + first) / BLOCK * 2);
    }

    void copy(int n, const Activations& from, int m) const {
        if (is_rounded_) {
            memcpy(rounded_.data() + n * step_, from.rounded_.data() + m * step_, step_ * 2);
            memcpy(scales_.data() + n * step_ / BLOCK * 2, from.scales_.data() + m * step_ / BLOCK * 2, step_ / BLOCK * 8);
        } else {
            memcpy(row(n), from.row(m), step_ * 4);
        }
    }

    Rows rows(int first = 0) const {
        return Rows{values_.data(), step_, 1, is_rounded_ ? rounded_.data() : nullptr, scales_.data(), step_}.from(first);
    }

  private:
    int in_ = 0;
    long step_ = 0;
    bool is_rounded_ = false;
    Buffer<float> values_, scales_;
    Buffer<int16_t> rounded_;
};
