/* A stand-in for libnvidia-ml.so.1: it answers from the text file that TOKENLOOM_NVML_STUB_STATE names, read again
 * whenever it has been replaced. stub.py writes that file and documents it.
 *
 * Compile with -DSTUB_BUILD="\"…\"" for the version that it has to share with the "kernel module", and with
 * -DSTUB_OLD for a driver from before nvmlDeviceGetTemperatureV, …ClocksEventReasons and …RunningProcesses_v3. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef STUB_BUILD
#define STUB_BUILD "1"
#endif

enum {
  SUCCESS = 0,
  UNINITIALIZED = 1,
  INVALID_ARGUMENT = 2,
  NOT_SUPPORTED = 3,
  NOT_FOUND = 6,
  TIMEOUT = 10,
  INSUFFICIENT_SIZE = 7,
  LIB_RM_VERSION_MISMATCH = 18,
  UNKNOWN = 999,
  MAX_CARDS = 16,
  MAX_FIELDS = 64,
  MAX_PROCESSES = 64,
};

typedef int ret_t;

struct field {
  char key[32];
  char value[1024];
};

struct section {
  struct field fields[MAX_FIELDS];
  int count;
};

static struct {
  struct section driver;
  struct section cards[MAX_CARDS];
  int card_count;
} state;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct stat seen;
static int sessions;
static int lost_in_session[MAX_CARDS];

static void parse(FILE *file) {
  char line[1200];
  struct section *section = &state.driver;
  memset(&state, 0, sizeof state);
  while (fgets(line, sizeof line, file)) {
    line[strcspn(line, "\n")] = 0;
    if (strcmp(line, "card") == 0 && state.card_count < MAX_CARDS) {
      section = &state.cards[state.card_count++];
      continue;
    }
    char *value = strchr(line, ' ');
    if (!value || section->count == MAX_FIELDS) continue;
    *value++ = 0;
    struct field *field = &section->fields[section->count++];
    snprintf(field->key, sizeof field->key, "%.31s", line);
    snprintf(field->value, sizeof field->value, "%.1023s", value);
  }
}

static void refresh(void) {
  const char *path = getenv("TOKENLOOM_NVML_STUB_STATE");
  struct stat now;
  if (!path || stat(path, &now) != 0) return;
  if (now.st_ino == seen.st_ino && now.st_mtim.tv_sec == seen.st_mtim.tv_sec &&
      now.st_mtim.tv_nsec == seen.st_mtim.tv_nsec)
    return;
  FILE *file = fopen(path, "r");
  if (!file) return;
  parse(file);
  fclose(file);
  seen = now;
}

static const char *find(const struct section *section, const char *key) {
  for (int i = 0; i < section->count; i++)
    if (strcmp(section->fields[i].key, key) == 0) return section->fields[i].value;
  return NULL;
}

/* "!3" is the error 3; nothing at all is "not supported". */
static ret_t look(const struct section *section, const char *key, const char **value) {
  *value = find(section, key);
  if (!*value) return NOT_SUPPORTED;
  return (*value)[0] == '!' ? atoi(*value + 1) : SUCCESS;
}

static ret_t driver_error(void) {
  pthread_mutex_lock(&lock);
  refresh();
  while (find(&state.driver, "hang")) {
    pthread_mutex_unlock(&lock);
    usleep(5000);
    pthread_mutex_lock(&lock);
    refresh();
  }
  const char *kernel = find(&state.driver, "kernel");
  const char *error = find(&state.driver, "error");
  pthread_mutex_unlock(&lock);
  if (kernel && strcmp(kernel, STUB_BUILD) != 0) return LIB_RM_VERSION_MISMATCH;
  return error ? atoi(error) : SUCCESS;
}

static ret_t enter(void) {
  ret_t error = driver_error();
  if (error) return error;
  return sessions ? SUCCESS : UNINITIALIZED;
}

/* A card that was lost stays so for the whole session, as real ones do. */
static ret_t card_error(int index) {
  ret_t error = enter();
  if (error) return error;
  if (index < 0 || index >= state.card_count) return INVALID_ARGUMENT;
  const char *problem = find(&state.cards[index], "error");
  if (problem) lost_in_session[index] = atoi(problem);
  return lost_in_session[index];
}

static ret_t card_value(void *device, const char *key, const char **value) {
  int index = (int)(long)device - 1;
  ret_t error = card_error(index);
  return error ? error : look(&state.cards[index], key, value);
}

static ret_t card_text(void *device, const char *key, char *text, unsigned length) {
  const char *value;
  ret_t error = card_value(device, key, &value);
  if (!error) snprintf(text, length, "%s", value);
  return error;
}

static ret_t card_number(void *device, const char *key, unsigned long long *number) {
  const char *value;
  ret_t error = card_value(device, key, &value);
  if (!error) *number = strtoull(value, NULL, 0);
  return error;
}

static ret_t card_unsigned(void *device, const char *key, unsigned *number) {
  unsigned long long wide = 0;
  ret_t error = card_number(device, key, &wide);
  if (!error) *number = (unsigned)wide;
  return error;
}

ret_t nvmlInitWithFlags(unsigned flags) {
  (void)flags;
  ret_t error = driver_error();
  if (error) return error;
  if (sessions++ == 0) memset(lost_in_session, 0, sizeof lost_in_session);
  return SUCCESS;
}

ret_t nvmlShutdown(void) {
  if (!sessions) return UNINITIALIZED;
  sessions--;
  return SUCCESS;
}

const char *nvmlErrorString(ret_t error) {
  (void)error;
  return "an error of the stub";
}

ret_t nvmlSystemGetDriverVersion(char *version, unsigned length) {
  ret_t error = enter();
  if (error) return error;
  const char *value;
  error = look(&state.driver, "version", &value);
  if (!error) snprintf(version, length, "%s", value);
  return error;
}

/* Instances of split cards come last, and are not cards of their own. */
static int whole_cards(void) {
  int count = 0;
  while (count < state.card_count && !find(&state.cards[count], "mig_instance")) count++;
  return count;
}

ret_t nvmlDeviceGetCount_v2(unsigned *count) {
  ret_t error = enter();
  if (!error) *count = (unsigned)whole_cards();
  return error;
}

ret_t nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  ret_t error = card_error((int)index);
  if (!error && (int)index >= whole_cards()) error = INVALID_ARGUMENT;
  if (!error) *device = (void *)(long)(index + 1);
  return error;
}

static ret_t by_uuid(const char *uuid, void **device) {
  for (int i = 0; i < state.card_count; i++) {
    const char *known = find(&state.cards[i], "uuid");
    if (known && strcmp(known, uuid) == 0) {
      *device = (void *)(long)(i + 1);
      return card_error(i);
    }
  }
  return NOT_FOUND;
}

ret_t nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  ret_t error = enter();
  return error ? error : by_uuid(uuid, device);
}

ret_t nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
  const char *value;
  ret_t error = card_value(device, "mig", &value);
  if (!error) *current = *pending = value[0] != 0;
  return error;
}

/* The word of a list, counted from 0; false when there are fewer. */
static int word(const char *list, unsigned index, char *found, size_t size) {
  char text[1024];
  snprintf(text, sizeof text, "%s", list);
  char *rest = NULL;
  char *item = strtok_r(text, " ", &rest);
  while (item && index--) item = strtok_r(NULL, " ", &rest);
  if (item) snprintf(found, size, "%s", item);
  return item != NULL;
}

ret_t nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count) {
  const char *value;
  ret_t error = card_value(device, "mig", &value);
  if (!error) *count = 7;
  return error;
}

ret_t nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned index, void **instance) {
  const char *value;
  char uuid[128];
  ret_t error = card_value(device, "mig", &value);
  if (error) return error;
  return word(value, index, uuid, sizeof uuid) ? by_uuid(uuid, instance) : NOT_FOUND;
}

ret_t nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) { return card_text(device, "uuid", uuid, length); }

ret_t nvmlDeviceGetName(void *device, char *name, unsigned length) { return card_text(device, "name", name, length); }

struct memory {
  unsigned long long total, free, used;
};

ret_t nvmlDeviceGetMemoryInfo(void *device, struct memory *memory) {
  ret_t error = card_number(device, "memory_total", &memory->total);
  if (!error) error = card_number(device, "memory_used", &memory->used);
  if (!error) memory->free = memory->total - memory->used;
  return error;
}

struct utilization {
  unsigned gpu, memory;
};

ret_t nvmlDeviceGetUtilizationRates(void *device, struct utilization *utilization) {
  ret_t error = card_unsigned(device, "utilization", &utilization->gpu);
  return error ? error : card_unsigned(device, "memory_utilization", &utilization->memory);
}

ret_t nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) {
  return sensor ? INVALID_ARGUMENT : card_unsigned(device, "temperature", celsius);
}

ret_t nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {
  return card_unsigned(device, "power_mw", milliwatts);
}

ret_t nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *milliwatts) {
  return card_unsigned(device, "power_limit_mw", milliwatts);
}

ret_t nvmlDeviceGetClockInfo(void *device, int type, unsigned *mhz) {
  if (type != 1 && type != 2) return INVALID_ARGUMENT;
  return card_unsigned(device, type == 1 ? "sm_clock" : "memory_clock", mhz);
}

ret_t nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons) {
  return card_number(device, "clock_reasons", reasons);
}

ret_t nvmlDeviceGetTotalEccErrors(void *device, int type, int counter, unsigned long long *count) {
  if (type > 1 || counter != 0) return INVALID_ARGUMENT;
  return card_number(device, type ? "ecc_uncorrected" : "ecc_corrected", count);
}

struct process {
  unsigned pid;
  unsigned long long memory;
  unsigned gpu_instance, compute_instance;
};

/* "123:4096 124:-": a "-" where the driver doesn't tell. */
static ret_t processes(void *device, const char *key, unsigned *count, struct process *found) {
  const char *value;
  ret_t error = card_value(device, key, &value);
  if (error) return error;
  char text[1024];
  snprintf(text, sizeof text, "%s", value);
  struct process all[MAX_PROCESSES];
  unsigned n = 0;
  char *rest = NULL;
  for (char *item = strtok_r(text, " ", &rest); item && n < MAX_PROCESSES; item = strtok_r(NULL, " ", &rest)) {
    char *memory = strchr(item, ':');
    all[n].pid = (unsigned)atoi(item);
    all[n].memory = memory && memory[1] != '-' ? strtoull(memory + 1, NULL, 0) : ~0ULL;
    all[n].gpu_instance = all[n].compute_instance = ~0U;
    n++;
  }
  unsigned room = *count;
  *count = n;
  if (n > room) return INSUFFICIENT_SIZE;
  if (found) memcpy(found, all, n * sizeof *all);
  return SUCCESS;
}

/* "1:8:79 2:2:0": events by number, NVML's type and data; each is told once in an event set. */
struct event_data {
  void *device;
  unsigned long long type, data;
  unsigned gpu_instance, compute_instance;
};

static struct {
  int open;
  unsigned long long wanted[MAX_CARDS];
  long told[MAX_CARDS];
} events;

ret_t nvmlEventSetCreate(void **set) {
  ret_t error = enter();
  if (error) return error;
  memset(&events, 0, sizeof events);
  events.open = 1;
  *set = &events;
  return SUCCESS;
}

ret_t nvmlEventSetFree(void *set) {
  events.open = 0;
  return set == &events ? SUCCESS : INVALID_ARGUMENT;
}

ret_t nvmlDeviceGetSupportedEventTypes(void *device, unsigned long long *types) {
  return card_number(device, "event_types", types);
}

ret_t nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set) {
  unsigned long long supported;
  ret_t error = card_number(device, "event_types", &supported);
  if (error) return error;
  if (set != &events || !events.open || (types & ~supported)) return INVALID_ARGUMENT;
  events.wanted[(long)device - 1] = types;
  return SUCCESS;
}

ret_t nvmlEventSetWait_v2(void *set, struct event_data *found, unsigned milliseconds) {
  (void)milliseconds;
  ret_t error = enter();
  if (error) return error;
  if (set != &events || !events.open) return INVALID_ARGUMENT;
  for (int i = 0; i < state.card_count; i++) {
    const char *list = find(&state.cards[i], "events");
    char item[64];
    for (unsigned n = 0; list && word(list, n, item, sizeof item); n++) {
      long number;
      unsigned long long type, data;
      if (sscanf(item, "%ld:%llu:%llu", &number, &type, &data) != 3) return UNKNOWN;
      if (number <= events.told[i] || !(type & events.wanted[i])) continue;
      events.told[i] = number;
      *found = (struct event_data){(void *)(long)(i + 1), type, data, ~0U, ~0U};
      return SUCCESS;
    }
  }
  return TIMEOUT;
}

ret_t nvmlDeviceGetPerformanceState(void *device, unsigned *number) {
  return card_unsigned(device, "performance_state", number);
}

ret_t nvmlDeviceGetFanSpeed(void *device, unsigned *percent) { return card_unsigned(device, "fan_speed", percent); }

ret_t nvmlDeviceGetMaxClockInfo(void *device, int type, unsigned *mhz) {
  return type == 1 ? card_unsigned(device, "max_sm_clock", mhz) : INVALID_ARGUMENT;
}

ret_t nvmlDeviceGetTemperatureThreshold(void *device, int which, unsigned *celsius) {
  return which == 1 ? card_unsigned(device, "slowdown_temperature", celsius) : INVALID_ARGUMENT;
}

ret_t nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
  return card_number(device, "energy_mj", millijoules);
}

ret_t nvmlDeviceGetPcieThroughput(void *device, int counter, unsigned *kilobytes) {
  return card_unsigned(device, counter ? "pcie_rx_kb" : "pcie_tx_kb", kilobytes);
}

ret_t nvmlDeviceGetCurrPcieLinkGeneration(void *device, unsigned *number) {
  return card_unsigned(device, "pcie_generation", number);
}

ret_t nvmlDeviceGetMaxPcieLinkGeneration(void *device, unsigned *number) {
  return card_unsigned(device, "max_pcie_generation", number);
}

ret_t nvmlDeviceGetCurrPcieLinkWidth(void *device, unsigned *lanes) { return card_unsigned(device, "pcie_width", lanes); }

ret_t nvmlDeviceGetMaxPcieLinkWidth(void *device, unsigned *lanes) {
  return card_unsigned(device, "max_pcie_width", lanes);
}

ret_t nvmlDeviceGetPcieReplayCounter(void *device, unsigned *count) {
  return card_unsigned(device, "pcie_replays", count);
}

/* "corrected uncorrected pending failed" */
ret_t nvmlDeviceGetRemappedRows(void *device, unsigned *corrected, unsigned *uncorrected, unsigned *pending,
                                unsigned *failed) {
  const char *value;
  ret_t error = card_value(device, "remapped_rows", &value);
  if (error) return error;
  return sscanf(value, "%u %u %u %u", corrected, uncorrected, pending, failed) == 4 ? SUCCESS : UNKNOWN;
}

ret_t nvmlDeviceGetGpuInstanceId(void *device, unsigned *number) {
  return card_unsigned(device, "mig_instance", number);
}

ret_t nvmlDeviceGetComputeInstanceId(void *device, unsigned *number) {
  unsigned long long instance;
  ret_t error = card_number(device, "mig_instance", &instance);
  if (!error) *number = 0;
  return error;
}

struct field_value {
  unsigned field, scope;
  long long timestamp, latency;
  unsigned type, error;
  unsigned long long value;
};

ret_t nvmlDeviceGetFieldValues(void *device, int count, struct field_value *values) {
  static const struct {
    unsigned field;
    const char *key;
  } known[] = {{82, "memory_temperature"}, {197, "pcie_tx_bytes"}, {198, "pcie_rx_bytes"}, {230, "recovery_action"}};
  ret_t error = card_error((int)(long)device - 1);
  if (error) return error;
  for (int i = 0; i < count; i++) {
    values[i].type = 3;
    values[i].error = INVALID_ARGUMENT;
    for (unsigned k = 0; k < sizeof known / sizeof *known; k++)
      if (known[k].field == values[i].field) values[i].error = (unsigned)card_number(device, known[k].key, &values[i].value);
  }
  return SUCCESS;
}

#ifdef STUB_OLD

ret_t nvmlDeviceGetComputeRunningProcesses_v2(void *device, unsigned *count, struct process *found) {
  return processes(device, "processes", count, found);
}

#else

struct temperature {
  unsigned version, sensor;
  int celsius;
};

ret_t nvmlDeviceGetTemperatureV(void *device, struct temperature *temperature) {
  if (temperature->version != 0x100000C || temperature->sensor) return INVALID_ARGUMENT;
  return card_unsigned(device, "temperature", (unsigned *)&temperature->celsius);
}

ret_t nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *reasons) {
  return card_number(device, "clock_reasons", reasons);
}

ret_t nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, struct process *found) {
  return processes(device, "processes", count, found);
}

ret_t nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned *count, struct process *found) {
  return processes(device, "drawing", count, found);
}

#endif
