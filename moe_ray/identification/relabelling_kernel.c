/* Counts relabellings of every expert; compiled at first use by relabelling_kernel.py, which says what the arguments are.

   The sum of a set of examples is what its part among the first examples adds up to, and its part among the others. So all
   sums of a kind are one addition each, of two tables that hold the sums of all subsets of either half; no sum is made twice,
   and what follows from it, up to the counts, stays in registers.

   Sets that are not all relabellings come as sums that were multiplied out before (`sweep_rows`).

   Letters as in the Python: X experts, N examples, P relabellings. Columns are ordered in runs that share the first half, and
   runs are filled up to whole registers with columns whose scale is NaN, which compare as neither large nor small. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define EXPERTS_AT_ONCE 16
#define REGISTER 16 /* columns: 64 bytes of floats */
#define WIDTH_OF_ROWS 128

typedef struct {
  int64_t num_first, num_second;               /* examples of the first half and of the second */
  int64_t num_runs, num_columns, widest_run;   /* columns with those that fill runs up */
  const int32_t *run_start, *run_first;        /* a run's first column (num_runs + 1 of them); its subset of the first half */
  const int32_t *run_second;                   /* where in `second` its subsets of the second half begin */
  const int32_t *second;                       /* subsets of the second half, by size, filled up as runs are */
  int64_t num_listed;                          /* how many that makes */
  const int32_t *relabelling;                  /* of each column; any for those that fill up */
} Halves;

/* Sums over all subsets of `num` values; the subset's bits are its index. */
#define DEFINE_SUBSET_SUMS(REAL, NAME)                                              \
  static void NAME(const double *values, int64_t num, REAL *sums) {                 \
    sums[0] = 0;                                                                    \
    for (int64_t bit = 0; bit < num; bit++)                                         \
      for (int64_t set = 0; set < (int64_t)1 << bit; set++)                         \
        sums[((int64_t)1 << bit) + set] = sums[set] + (REAL)values[bit];            \
  }
DEFINE_SUBSET_SUMS(float, subset_sums_float)
DEFINE_SUBSET_SUMS(double, subset_sums_double)

static float signed_square(float r) { return r * fabsf(r); }
static float lowered(float t, float margin) {
  float r = t < 0 ? -sqrtf(-t) : sqrtf(t);
  return signed_square(r - margin);
}

/* One run of one expert; returns whether a value lies between the edges or may be a maximum. */
static inline __attribute__((always_inline)) int run_of_expert(
    int64_t num, const float *restrict linear, const float *restrict square, const float *restrict cross, float linear_0,
    float square_0, float cross_0, float square_all, float cross_all, const float *const *coefficient, int64_t start,
    const float *restrict top, const float *restrict bottom, float low, float high, int is_mirrored,
    float *restrict values, int64_t *sure) {
  const float *restrict scale = coefficient[0] + start, *restrict square_unsafe = coefficient[1] + start,
                        *restrict square_every = coefficient[2] + start, *restrict cross_unsafe = coefficient[3] + start,
                        *restrict cross_every = coefficient[4] + start, *restrict curve = coefficient[5] + start;
  int32_t above = 0, maybe = 0, highest = 0;
  for (int64_t j = 0; j < num / REGISTER * REGISTER; j++) {
    float difference = (linear_0 + linear[j]) * scale[j];
    float within = (square_0 + square[j]) * square_unsafe[j] + square_all * square_every[j];
    float mixed = (cross_0 + cross[j]) * cross_unsafe[j] + cross_all * cross_every[j];
    float error = within + difference * (mixed + difference * curve[j]);
    float value = difference * fabsf(difference) / error;
    float compared = is_mirrored ? fabsf(value) : value;
    values[j] = value;
    above += compared >= high;
    maybe += compared >= low;
    highest |= (value >= top[j]) | (value <= bottom[j]);
  }
  *sure += above;
  return (maybe != above) | (highest << 1);
}

typedef struct {
  int32_t *expert, *column;
  float *value;
  int64_t num, most;
} Found;

static int append(Found *found, int32_t expert, int32_t column, float value) {
  if (found->num == found->most) return -1;
  found->expert[found->num] = expert;
  found->column[found->num] = column;
  found->value[found->num++] = value;
  return 0;
}

/* What is looked for, and what was found of it. */
typedef struct {
  const float *low_X, *high_X;                 /* values from `high` on surely reach an expert's bound, below `low` none does */
  float margin;                                /* values this near in r may be equal */
  int32_t is_mirrored;
  int64_t most_near;                           /* noted of an expert */
  int64_t *sure_X, *near_X;                    /* how many reach the bound, and how many are too near to tell */
  float *top_P, *bottom_P;                     /* from here on a value may be a column's largest, or least */
  float *values;                               /* room for a run */
  Found near, largest, least;
} Search;

/* Looks through one run of one expert; -1 where what it finds does not fit. */
static inline int search_run(Search *search, int64_t x, int64_t start, int64_t num, const float *linear, const float *square,
                             const float *cross, float linear_0, float square_0, float cross_0, float square_all,
                             float cross_all, const float *const *coefficient, const int32_t *relabelling) {
  float low = search->low_X[x], high = search->high_X[x], *values = search->values;
  float *top_P = search->top_P, *bottom_P = search->bottom_P;
  int result = 0;
#define RUN(mirrored)                                                                                                     \
  run_of_expert(num, linear, square, cross, linear_0, square_0, cross_0, square_all, cross_all, coefficient, start,       \
                top_P + start, bottom_P + start, low, high, mirrored, values, &search->sure_X[x])
  int what = search->is_mirrored ? RUN(1) : RUN(0);
  if (what & 1)
    for (int64_t j = 0; j < num; j++) {
      float compared = search->is_mirrored ? fabsf(values[j]) : values[j];
      if (compared >= low && !(compared >= high) && search->near_X[x]++ < search->most_near)
        result |= append(&search->near, x, relabelling ? relabelling[start + j] : start + j, values[j]);
    }
  if (what & 2)
    for (int64_t j = 0; j < num; j++) {
      int64_t p = start + j;
      if (values[j] >= top_P[p]) {
        float raised = lowered(values[j], search->margin);
        result |= append(&search->largest, x, p, values[j]);
        if (raised > top_P[p]) top_P[p] = raised;
      }
      if (values[j] <= bottom_P[p]) {
        float sunk = -lowered(-values[j], search->margin);
        result |= append(&search->least, x, p, values[j]);
        if (sunk < bottom_P[p]) bottom_P[p] = sunk;
      }
    }
  return result;
}

/* In single precision, all experts and all relabellings. 0, or -1 where what is found does not fit. */
int64_t sweep(const Halves *halves, Search *search, int64_t num_experts, const double *linear_XN, const double *square_XN,
              const double *cross_XN, const float *square_all_X, const float *cross_all_X, const float *coefficient_6P) {
  int64_t num = halves->num_first + halves->num_second;
  int64_t firsts = (int64_t)1 << halves->num_first, seconds = halves->num_listed;
  float *sums = malloc(sizeof(float) * (3 * EXPERTS_AT_ONCE * (firsts + seconds) + ((int64_t)1 << halves->num_second)));
  if (!sums) return -1;
  float *second = sums + 3 * EXPERTS_AT_ONCE * firsts, *bits = second + 3 * EXPERTS_AT_ONCE * seconds;
  const double *sources[3] = {linear_XN, square_XN, cross_XN};
  const float *coefficient[6];
  int result = 0;
  for (int64_t i = 0; i < 6; i++) coefficient[i] = coefficient_6P + i * halves->num_columns;
  for (int64_t from = 0; from < num_experts && !result; from += EXPERTS_AT_ONCE) {
    int64_t here = num_experts - from < EXPERTS_AT_ONCE ? num_experts - from : EXPERTS_AT_ONCE;
    for (int64_t k = 0; k < here; k++)
      for (int64_t kind = 0; kind < 3; kind++) {
        const double *row = sources[kind] + (from + k) * num;
        float *ordered = second + (3 * k + kind) * seconds;
        subset_sums_float(row, halves->num_first, sums + (3 * k + kind) * firsts);
        subset_sums_float(row + halves->num_first, halves->num_second, bits);
        for (int64_t set = 0; set < seconds; set++) ordered[set] = bits[halves->second[set]];
      }
    for (int64_t run = 0; run < halves->num_runs && !result; run++) {
      int64_t start = halves->run_start[run], width = halves->run_start[run + 1] - start;
      for (int64_t k = 0; k < here && !result; k++) {
        const float *first_of = sums + 3 * k * firsts + halves->run_first[run];
        const float *second_of = second + 3 * k * seconds + halves->run_second[run];
        result |= search_run(search, from + k, start, width, second_of, second_of + seconds, second_of + 2 * seconds,
                             first_of[0], first_of[firsts], first_of[2 * firsts], square_all_X[from + k],
                             cross_all_X[from + k], coefficient, halves->relabelling);
      }
    }
  }
  free(sums);
  return result;
}

/* The same of a block of experts, from `from` on, whose sums are products that were made before: the difference, the variance
   within and what is mixed. `coefficient_6P` makes nothing of them but a value. Runs are `WIDTH_OF_ROWS` columns. */
int64_t sweep_rows(Search *search, int64_t from, int64_t here, int64_t num_columns, const float *difference_XP,
                   const float *within_XP, const float *mixed_XP, const float *coefficient_6P) {
  const float *coefficient[6];
  int result = 0;
  for (int64_t i = 0; i < 6; i++) coefficient[i] = coefficient_6P + i * num_columns;
  for (int64_t k = 0; k < here && !result; k++)
    for (int64_t start = 0; start < num_columns && !result; start += WIDTH_OF_ROWS) {
      int64_t num = num_columns - start < WIDTH_OF_ROWS ? num_columns - start : WIDTH_OF_ROWS, at = k * num_columns + start;
      result |= search_run(search, from + k, start, num, difference_XP + at, within_XP + at, mixed_XP + at, 0, 0, 0, 0, 0,
                           coefficient, NULL);
    }
  return result;
}

/* Most values were the largest only until a larger one came: keeps those that still may be, and names their relabellings. */
void keep_extremes(Search *search, const int32_t *relabelling) {
  for (int64_t side = 0; side < 2; side++) {
    Found *found = side ? &search->least : &search->largest;
    int64_t kept = 0;
    for (int64_t i = 0; i < found->num; i++) {
      int32_t p = found->column[i];
      if (side ? found->value[i] > search->bottom_P[p] : found->value[i] < search->top_P[p]) continue;
      found->expert[kept] = found->expert[i];
      found->column[kept++] = relabelling ? relabelling[p] : p;
    }
    found->num = kept;
  }
}

static inline double studentised(double linear, double square, double cross, double square_all, double cross_all,
                                 const double *const *coefficient, int64_t p) {
  double difference = linear * coefficient[0][p];
  double within = square * coefficient[1][p] + square_all * coefficient[2][p];
  double mixed = cross * coefficient[3][p] + cross_all * coefficient[4][p];
  return difference / sqrt(within + difference * (mixed + difference * coefficient[5][p]));
}

/* In double precision: the value of single experts and columns. */
void elements(int64_t num, int64_t num_relabellings, int64_t num_elements, const int32_t *expert, const int32_t *column,
              const double *linear_XN, const double *square_XN, const double *cross_XN, const double *square_all_X,
              const double *cross_all_X, const double *coefficient_6P, const double *unsafe_PN, double *values) {
  const double *coefficient[6];
  for (int64_t i = 0; i < 6; i++) coefficient[i] = coefficient_6P + i * num_relabellings;
  for (int64_t i = 0; i < num_elements; i++) {
    int64_t x = expert[i], p = column[i];
    double linear = 0, square = 0, cross = 0;
    const double *unsafe = unsafe_PN + p * num;
    for (int64_t n = 0; n < num; n++) {
      linear += linear_XN[x * num + n] * unsafe[n];
      square += square_XN[x * num + n] * unsafe[n];
      cross += cross_XN[x * num + n] * unsafe[n];
    }
    values[i] = studentised(linear, square, cross, square_all_X[x], cross_all_X[x], coefficient, p);
  }
}

/* In double precision: the columns whose value reaches `edge` of each of some experts. 0, or -1 without memory. */
int64_t count_exactly(const Halves *halves, int64_t num_chosen, const int32_t *chosen, const double *linear_XN,
                      const double *square_XN, const double *cross_XN, const double *square_all_X,
                      const double *cross_all_X, const double *coefficient_6P, const double *edge, int32_t is_mirrored,
                      int64_t *above) {
  int64_t num = halves->num_first + halves->num_second;
  int64_t firsts = (int64_t)1 << halves->num_first, seconds = halves->num_listed;
  double *sums = malloc(sizeof(double) * (3 * firsts + 3 * seconds + ((int64_t)1 << halves->num_second)));
  if (!sums) return -1;
  double *second = sums + 3 * firsts, *bits = second + 3 * seconds;
  const double *sources[3] = {linear_XN, square_XN, cross_XN}, *coefficient[6];
  for (int64_t i = 0; i < 6; i++) coefficient[i] = coefficient_6P + i * halves->num_columns;
  for (int64_t i = 0; i < num_chosen; i++) {
    int64_t x = chosen[i], count = 0;
    for (int64_t kind = 0; kind < 3; kind++) {
      subset_sums_double(sources[kind] + x * num, halves->num_first, sums + kind * firsts);
      subset_sums_double(sources[kind] + x * num + halves->num_first, halves->num_second, bits);
      for (int64_t set = 0; set < seconds; set++) second[kind * seconds + set] = bits[halves->second[set]];
    }
    for (int64_t run = 0; run < halves->num_runs; run++) {
      int64_t start = halves->run_start[run], width = halves->run_start[run + 1] - start;
      const double *first_of = sums + halves->run_first[run], *second_of = second + halves->run_second[run];
      int32_t reached = 0;
      for (int64_t j = 0; j < width; j++) {
        double value = studentised(first_of[0] + second_of[j], first_of[firsts] + second_of[seconds + j],
                                   first_of[2 * firsts] + second_of[2 * seconds + j], square_all_X[x], cross_all_X[x],
                                   coefficient, start + j);
        reached += (is_mirrored ? fabs(value) : value) >= edge[i];
      }
      count += reached;
    }
    above[i] = count;
  }
  free(sums);
  return 0;
}
