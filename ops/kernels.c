/* Attention within rows, GELU, and dropout + residual sum + LayerNorm, forward and backward, each in one go over
   memory, in float32 on the CPU. kernels.py compiles this file and calls it; the definitions are in torch's operations,
   in the module of each operation.

   Shape letters: N packed tokens, B rows of tokens, L tokens of a row, D hidden, H heads, E = D / H. All matrices are
   row-major. Dropout comes as 16 random bits an element: it is kept where (int16_t) bits >= threshold, and then
   multiplied by `keep`; without bits nothing is dropped. (Attention may read up to LANES words more than there are
   elements.) Work is shared out over `threads` threads. Sums over rows depend on their number; nothing depends on which
   thread does what, so that the same call gives the same bits. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16 /* floats that are handled together: GCC is slow with vectors that are wider than the registers */
#else
#define LANES 8
#endif
#define QUERIES 4

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t int_lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int16_t word_lanes __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

static inline lanes at(const float *place) { return *(const lanes *)place; }
static inline void put(lanes values, float *place) { *(lanes *)place = values; }

/* The first `count` of LANES places, the others zero. */
static inline lanes some_at(const float *place, long count)
{
    lanes values = {0};
    memcpy(&values, place, sizeof(float) * count);
    return values;
}

static inline lanes choose(int_lanes condition, lanes yes, lanes no)
{
    return (lanes)((condition & (int_lanes)yes) | (~condition & (int_lanes)no));
}

static inline float kept(int16_t bits, int threshold, float keep) { return bits >= threshold ? keep : 0.0f; }

static inline lanes kept_lanes(const int16_t *bits, int threshold, float keep)
{
    const int_lanes words = __builtin_convertvector(*(const word_lanes *)bits, int_lanes);
    return (lanes)((words >= threshold) & (int_lanes)(keep + (lanes){0}));
}

static const int_lanes PLACES = {
    0, 1, 2, 3, 4, 5, 6, 7,
#if LANES == 16
    8, 9, 10, 11, 12, 13, 14, 15,
#endif
};

static inline lanes folded(lanes x, int distance) { return __builtin_shuffle(x, PLACES ^ distance); }

static inline float sum_of(lanes x)
{
    for (int distance = LANES / 2; distance; distance /= 2) x += folded(x, distance);
    return x[0];
}

static inline lanes larger(lanes x, lanes y) { return choose(x > y, x, y); }

static inline float largest_of(lanes x)
{
    for (int distance = LANES / 2; distance; distance /= 2) x = larger(x, folded(x, distance));
    return x[0];
}

/* exp by 2^n * exp(r), |r| <= ln(2) / 2, with a polynomial for exp(r): relative error below 2e-7. Below -87 it is 0:
   numbers too small to be normal would make every operation that meets them a hundred times slower. NaN stays NaN. */
static inline lanes exponential(lanes x)
{
    const int_lanes vanishes = x < -87.0f;
    const lanes shifted = x * 1.44269504f + 12582912.0f; /* its last bits are those of the nearest integer */
    const lanes n = shifted - 12582912.0f;
    const lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    lanes p = 1.38144668e-3f * r + 8.36878043e-3f;
    p = p * r + 4.16683942e-2f;
    p = p * r + 1.66665201e-1f;
    p = p * r + 4.99999934e-1f;
    p = p * (r * r) + (r + 1.0f);
    const lanes power = (lanes)(((int_lanes)shifted + 127) << 23);
    return (lanes)((int_lanes)(p * power) & ~vanishes);
}

/* The normal distribution function Phi(x) and its density. The tail beyond |x| is exp(-x^2 / 2) times a polynomial in
   t = 1 / (1 + 0.3 |x|) (the form of Hastings 1955; coefficients fitted to the scaled complementary error function up
   to |x| = 13.5, relative error 1.3e-7). */
static inline lanes normal(lanes x, lanes *density)
{
    const lanes size = (lanes)((int_lanes)x & 0x7fffffff);
    const lanes t = 1.0f / (1.0f + 0.3f * size);
    const lanes e = exponential(-0.5f * x * x);
    lanes p = 3.59317467e-2f * t - 1.58276045e-1f;
    p = p * t + 2.08206675e-1f;
    p = p * t - 5.53939047e-2f;
    p = p * t + 1.29469228e-1f;
    p = p * t + 9.96374856e-2f;
    p = p * t + 1.20798360e-1f;
    p = p * t + 1.19626390e-1f;
    const lanes tail = e * p * t;
    *density = e * 0.398942280f;
    return choose(x > 0.0f, 1.0f - tail, tail);
}

/* ---------------------------------------------------------------------------------------------------------- GELU */

enum { CHUNK = 4096 }; /* numbers that a thread takes at a time; a multiple of LANES */

/* output = GELU(input), `num` numbers. */
void gelu_forward(long num, const float *input, float *output, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long first = 0; first < num; first += CHUNK) {
        const long end = first + CHUNK < num ? first + CHUNK : num;
        long i = first;
        lanes density;
        for (; i + LANES <= end; i += LANES) put(at(input + i) * normal(at(input + i), &density), output + i);
        if (i < end) {
            const lanes value = some_at(input + i, end - i), result = value * normal(value, &density);
            memcpy(output + i, &result, sizeof(float) * (end - i));
        }
    }
}

void gelu_backward(long num, const float *input, const float *grad, float *grad_input, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long first = 0; first < num; first += CHUNK) {
        const long end = first + CHUNK < num ? first + CHUNK : num;
        long i = first;
        lanes density;
        for (; i + LANES <= end; i += LANES) {
            const lanes value = at(input + i), probability = normal(value, &density);
            put(at(grad + i) * (probability + value * density), grad_input + i);
        }
        if (i < end) {
            const lanes value = some_at(input + i, end - i), probability = normal(value, &density);
            const lanes result = some_at(grad + i, end - i) * (probability + value * density);
            memcpy(grad_input + i, &result, sizeof(float) * (end - i));
        }
    }
}

/* ------------------------------------------------------------------------------------------ residual sum, LayerNorm */

/* sums (N, D) = residual + dropout(update) + term, output = LayerNorm(sums) * weight + bias; `mean` and `scale`
   (N,) are what LayerNorm subtracts and multiplies by. bits and term may be absent; weight and bias are (D,). */
void residual_norm_forward(long num_rows, long size, const float *update, const float *residual, const float *term,
                           const int16_t *bits, int threshold, float keep, const float *weight,
                           const float *bias, float epsilon, float *sums, float *mean, float *scale, float *output,
                           int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < num_rows; row++) {
        const long first = row * size;
        const float *x = update + first, *r = residual + first;
        float *s = sums + first, *y = output + first;
        if (bits) {
            const int16_t *b = bits + first;
#pragma omp simd
            for (long i = 0; i < size; i++) s[i] = r[i] + x[i] * kept(b[i], threshold, keep);
        } else {
#pragma omp simd
            for (long i = 0; i < size; i++) s[i] = r[i] + x[i];
        }
        if (term) {
#pragma omp simd
            for (long i = 0; i < size; i++) s[i] += term[first + i];
        }
        float total = 0, squares = 0;
#pragma omp simd reduction(+ : total)
        for (long i = 0; i < size; i++) total += s[i];
        const float m = total / size;
#pragma omp simd reduction(+ : squares)
        for (long i = 0; i < size; i++) squares += (s[i] - m) * (s[i] - m);
        const float f = 1.0f / sqrtf(squares / size + epsilon);
        mean[row] = m;
        scale[row] = f;
#pragma omp simd
        for (long i = 0; i < size; i++) y[i] = (s[i] - m) * f * weight[i] + bias[i];
    }
}

/* grad_sums (N, D): of the residual and of the term; grad_update (N, D), the same array where nothing was dropped.
   grad_weight, grad_bias (threads, D), zero before: each thread's part of the sum over rows. */
void residual_norm_backward(long num_rows, long size, const float *grad, const float *sums, const float *mean,
                            const float *scale, const float *weight, const int16_t *bits, int threshold, float keep,
                            float *grad_sums, float *grad_update, float *grad_weight, float *grad_bias, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long part = 0; part < threads; part++) {
        float *gw = grad_weight + part * size, *gb = grad_bias + part * size;
        for (long row = num_rows * part / threads; row < num_rows * (part + 1) / threads; row++) {
            const long first = row * size;
            const float *g = grad + first, *s = sums + first;
            float *into = grad_sums + first;
            const float m = mean[row], f = scale[row];
            float total = 0, along = 0; /* of the gradient of the normalized row, and of its product with that row */
#pragma omp simd reduction(+ : total, along)
            for (long i = 0; i < size; i++) {
                const float normalized = (s[i] - m) * f, weighted = g[i] * weight[i];
                total += weighted;
                along += weighted * normalized;
                gw[i] += g[i] * normalized;
                gb[i] += g[i];
            }
            total /= size;
            along /= size;
#pragma omp simd
            for (long i = 0; i < size; i++)
                into[i] = f * (g[i] * weight[i] - total - (s[i] - m) * f * along);
            if (bits) {
                const int16_t *b = bits + first;
                float *to = grad_update + first;
#pragma omp simd
                for (long i = 0; i < size; i++) to[i] = into[i] * kept(b[i], threshold, keep);
            }
        }
    }
}

/* ------------------------------------------------------------------------------------------------------- attention */

/* Where the rows and heads of a batch lie. Key and value k of row r stand in line starts[r] + k of theirs, and so does
   query k, unless there is only one query a row: that of row r stands in line r. A line is `stride` floats, of which
   head h has those from h * E on. The random bits of query q, key k of head h in row r are at
   bits_starts[r] + (h * bits_strides[r] + q) * bits_strides[r] + k, with one query a row at
   bits_starts[r] + h * bits_strides[r] + k. */
typedef struct {
    long num_rows, num_heads, head_size, first_only;
    const int64_t *starts, *lengths, *bits_starts, *bits_strides;
    const int16_t *bits;
    int threshold;
    float keep;
} Rows;

static long num_queries(const Rows *rows, long row) { return rows->first_only ? 1 : rows->lengths[row]; }
static long first_query(const Rows *rows, long row) { return rows->first_only ? row : rows->starts[row]; }

/* out (QUERIES, columns) = a (QUERIES, inner) b (inner, columns); columns: a multiple of LANES, and the stride of b and
   out. */
static inline void product(long inner, long columns, const float *a, long a_stride, const float *b, float *out)
{
    long column = 0;
    for (; column + 2 * LANES <= columns; column += 2 * LANES) {
        lanes sum[QUERIES][2] = {0};
        for (long k = 0; k < inner; k++) {
            const lanes b0 = *(const lanes *)(b + k * columns + column);
            const lanes b1 = *(const lanes *)(b + k * columns + column + LANES);
            for (int q = 0; q < QUERIES; q++) {
                sum[q][0] += a[q * a_stride + k] * b0;
                sum[q][1] += a[q * a_stride + k] * b1;
            }
        }
        for (int q = 0; q < QUERIES; q++) {
            *(lanes *)(out + q * columns + column) = sum[q][0];
            *(lanes *)(out + q * columns + column + LANES) = sum[q][1];
        }
    }
    for (; column < columns; column += LANES) {
        lanes sum[QUERIES] = {0};
        for (long k = 0; k < inner; k++)
            for (int q = 0; q < QUERIES; q++)
                sum[q] += a[q * a_stride + k] * *(const lanes *)(b + k * columns + column);
        for (int q = 0; q < QUERIES; q++) *(lanes *)(out + q * columns + column) = sum[q];
    }
}

/* out (rows, columns) += a^T b, a (QUERIES, rows), b (QUERIES, columns). */
static inline void add_outer(long rows, long columns, const float *a, long a_stride, const float *b, float *out)
{
    for (long column = 0; column < columns; column += LANES) {
        lanes of[QUERIES];
        for (int q = 0; q < QUERIES; q++) of[q] = *(const lanes *)(b + q * columns + column);
        for (long row = 0; row < rows; row++) {
            lanes *into = (lanes *)(out + row * columns + column);
            lanes sum = *into;
            for (int q = 0; q < QUERIES; q++) sum += a[q * a_stride + row] * of[q];
            *into = sum;
        }
    }
}

/* One head of a row, (lines, width) of the source: transposed to (E, lines_padded), or to (lines, width_padded). */
static void load_transposed(long lines, long width, long padded, const float *from, long stride, float *to)
{
    memset(to, 0, sizeof(float) * width * padded);
    for (long line = 0; line < lines; line++)
        for (long i = 0; i < width; i++) to[i * padded + line] = from[line * stride + i];
}

static void load(long lines, long width, long padded, const float *from, long stride, float factor, float *to)
{
    for (long line = 0; line < lines; line++) {
        for (long i = 0; i < width; i++) to[line * padded + i] = factor * from[line * stride + i];
        for (long i = width; i < padded; i++) to[line * padded + i] = 0;
    }
}

static void store(long lines, long width, long padded, const float *from, float factor, float *to, long stride)
{
    for (long line = 0; line < lines; line++)
        for (long i = 0; i < width; i++) to[line * stride + i] = factor * from[line * padded + i];
}

/* QUERIES queries of a head: places behind the last one are zero. */
static void load_queries(long lines, long width, long padded, const float *from, long stride, float factor, float *to)
{
    memset(to, 0, sizeof(float) * QUERIES * padded);
    load(lines, width, padded, from, stride, factor, to);
}

static const int16_t *bits_of(const Rows *rows, long row, long head, long query)
{
    const long stride = rows->bits_strides[row];
    return rows->bits + rows->bits_starts[row] + (rows->first_only ? head : head * stride + query) * stride;
}

static long longest(const Rows *rows)
{
    long most = 1;
    for (long row = 0; row < rows->num_rows; row++) most = rows->lengths[row] > most ? rows->lengths[row] : most;
    return most;
}

/* What to add to the last LANES of `padded` scores so that the exponential of those from `length` on is nothing. */
static inline lanes tail_of(long length, long padded)
{
    lanes tail = {0};
    for (int i = 0; i < LANES; i++) tail[i] = padded - LANES + i < length ? 0.0f : -INFINITY;
    return tail;
}

/* `padded` scores, a multiple of LANES, become exponentials of their distance from the largest one; returns what
   divides them by their sum. */
static inline float exponentials(long padded, lanes tail, float *scores, float *largest)
{
    const long last = padded - LANES;
    lanes most = at(scores + last) + tail, sum = {0};
    put(most, scores + last);
    for (long k = 0; k < last; k += LANES) most = larger(at(scores + k), most);
    *largest = largest_of(most);
    for (long k = 0; k < padded; k += LANES) {
        const lanes e = exponential(at(scores + k) - *largest);
        sum += e;
        put(e, scores + k);
    }
    return 1.0f / sum_of(sum);
}

/* context: softmax(Q K^T / sqrt(E)) V with dropout on the probabilities; softmax (queries, H, 2): the largest score of
   each query and the factor of its exponentials, by which the backward pass finds the probabilities again. */
void attention_forward(const Rows *rows, const float *query, long query_stride, const float *key, const float *value,
                       long stride, float *context, float *softmax, int threads)
{
    const long size = rows->head_size, hidden = rows->num_heads * size, width = round_up(size, LANES);
    const long most = round_up(longest(rows), LANES);
    const float factor = 1.0f / sqrtf(size);
#pragma omp parallel num_threads(threads)
    {
        float *memory = aligned_alloc(64, sizeof(float) * (most * (2 * width + QUERIES) + 2 * QUERIES * width));
        float *keys = memory, *values = keys + most * width, *scores = values + most * width;
        float *queries = scores + QUERIES * most, *sums = queries + QUERIES * width;
#pragma omp for schedule(dynamic, rows->num_heads)
        for (long item = 0; item < rows->num_rows * rows->num_heads; item++) {
            const long row = item / rows->num_heads, head = item % rows->num_heads;
            const long length = rows->lengths[row], padded = round_up(length, LANES);
            const long first = rows->starts[row] * stride + head * size;
            const lanes tail = tail_of(length, padded);
            load_transposed(length, size, padded, key + first, stride, keys);
            load(length, size, width, value + first, stride, 1, values);
            for (long start = 0; start < num_queries(rows, row); start += QUERIES) {
                const long left = num_queries(rows, row) - start, count = left < QUERIES ? left : QUERIES;
                const long line = first_query(rows, row) + start;
                const float *from = query + line * query_stride + head * size;
                load_queries(count, size, width, from, query_stride, factor, queries);
                product(size, padded, queries, width, keys, scores);
                for (long q = 0; q < count; q++) {
                    float *p = scores + q * padded, *of_query = softmax + 2 * ((line + q) * rows->num_heads + head);
                    const float share = of_query[1] = exponentials(padded, tail, p, of_query);
                    if (rows->bits) {
                        const int16_t *bits = bits_of(rows, row, head, start + q);
                        const float keep = rows->keep * share;
                        for (long k = 0; k < padded; k += LANES)
                            put(at(p + k) * kept_lanes(bits + k, rows->threshold, keep), p + k);
                    } else {
                        for (long k = 0; k < padded; k += LANES) put(at(p + k) * share, p + k);
                    }
                }
                product(length, width, scores, padded, values, sums);
                store(count, size, width, sums, 1, context + line * hidden + head * size, hidden);
            }
        }
        free(memory);
    }
}

/* The gradients lie as query, key and value do, and the gradient of the context as the context does. */
void attention_backward(const Rows *rows, const float *query, long query_stride, const float *key, const float *value,
                        long stride, const float *softmax, const float *grad, float *grad_query, float *grad_key,
                        float *grad_value, int threads)
{
    const long size = rows->head_size, hidden = rows->num_heads * size, width = round_up(size, LANES);
    const long most = round_up(longest(rows), LANES);
    const float factor = 1.0f / sqrtf(size);
#pragma omp parallel num_threads(threads)
    {
        float *memory = aligned_alloc(64, sizeof(float) * (most * (5 * width + 3 * QUERIES) + 3 * QUERIES * width));
        float *keys = memory, *keys_t = keys + most * width, *values_t = keys_t + most * width;
        float *grad_keys = values_t + most * width, *grad_values = grad_keys + most * width;
        float *probs = grad_values + most * width, *dropped = probs + QUERIES * most;
        float *grads = dropped + QUERIES * most, *queries = grads + QUERIES * most;
        float *grad_context = queries + QUERIES * width, *sums = grad_context + QUERIES * width;
#pragma omp for schedule(dynamic, rows->num_heads)
        for (long item = 0; item < rows->num_rows * rows->num_heads; item++) {
            const long row = item / rows->num_heads, head = item % rows->num_heads;
            const long length = rows->lengths[row], padded = round_up(length, LANES);
            const long first = rows->starts[row] * stride + head * size;
            const lanes tail = tail_of(length, padded);
            load(length, size, width, key + first, stride, 1, keys);
            load_transposed(length, size, padded, key + first, stride, keys_t);
            load_transposed(length, size, padded, value + first, stride, values_t);
            memset(grad_keys, 0, sizeof(float) * length * width);
            memset(grad_values, 0, sizeof(float) * length * width);
            for (long start = 0; start < num_queries(rows, row); start += QUERIES) {
                const long left = num_queries(rows, row) - start, count = left < QUERIES ? left : QUERIES;
                const long line = first_query(rows, row) + start, place = line * query_stride + head * size;
                load_queries(count, size, width, query + place, query_stride, factor, queries);
                load_queries(count, size, width, grad + line * hidden + head * size, hidden, 1, grad_context);
                product(size, padded, queries, width, keys_t, probs);
                product(size, padded, grad_context, width, values_t, grads);
                memset(dropped, 0, sizeof(float) * QUERIES * padded);
                for (long q = 0; q < count; q++) {
                    float *p = probs + q * padded, *g = grads + q * padded, *d = dropped + q * padded;
                    const float *of_query = softmax + 2 * ((line + q) * rows->num_heads + head);
                    const float largest = of_query[0], share = of_query[1];
                    lanes mean = {0};
                    put(at(p + padded - LANES) + tail, p + padded - LANES);
                    for (long k = 0; k < padded; k += LANES) {
                        const lanes prob = exponential(at(p + k) - largest) * share;
                        lanes mask = {0};
                        if (rows->bits)
                            mask = kept_lanes(bits_of(rows, row, head, start + q) + k, rows->threshold, rows->keep);
                        else
                            mask += 1.0f;
                        const lanes grad_prob = at(g + k) * mask;
                        put(prob, p + k);
                        put(prob * mask, d + k);
                        put(grad_prob, g + k);
                        mean += prob * grad_prob;
                    }
                    const float along = sum_of(mean);
                    for (long k = 0; k < padded; k += LANES) put(at(p + k) * (at(g + k) - along), g + k);
                }
                product(length, width, grads, padded, keys, sums);
                store(count, size, width, sums, factor, grad_query + place, query_stride);
                add_outer(length, width, dropped, padded, grad_context, grad_values);
                add_outer(length, width, grads, padded, queries, grad_keys);
            }
            store(length, size, width, grad_keys, 1, grad_key + first, stride);
            store(length, size, width, grad_values, 1, grad_value + first, stride);
        }
        free(memory);
    }
}
