/* libnvidia-ml.so.1 of a machine that has no card: what the probe calls of it, and four ways to fail.
 * What it does is one word in /etc/nvml-stand-in. Like the driver's it opens the devices, and fails without. */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char what[32];

static int is(const char *word) { return strncmp(what, word, strlen(word)) == 0; }

int nvmlInit_v2(void)
{
    int fd = open("/etc/nvml-stand-in", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, what, sizeof what - 1) <= 0)
        return 999;
    close(fd);
    if (is("crash"))
        kill(getpid(), SIGSEGV);
    while (is("hang"))
        pause();
    if (is("chatter"))
        printf("{\"v\":1,\"reading\":\"read\",\"gpus\":[],\"driver\":\"\",\"detail\":\"\"}\n"), fflush(stdout);
    if (is("mismatch"))
        return 18;
    return open("/dev/nvidiactl", O_WRONLY) < 0 || open("/dev/nvidia0", O_WRONLY) < 0 ? 999 : 0;
}

const char *nvmlErrorString(int code)
{
    return code == 18 ? "Driver/library version mismatch" : "Unknown Error";
}

int nvmlDeviceGetCount_v2(unsigned int *count) { return *count = 1, 0; }

int nvmlSystemGetDriverVersion(char *text, unsigned int most)
{
    return snprintf(text, most, "550.163.01"), 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **card) { return *card = what + index, 0; }

int nvmlDeviceGetName(void *card, char *text, unsigned int most)
{
    (void)card;
    if (is("flood"))
        memset(text, 27, 1 << 20); /* far past the end of what it was given */
    else
        snprintf(text, most, is("control") ? "\033[2JRTX\n3090" : "NVIDIA GeForce RTX 3090");
    return 0;
}

int nvmlDeviceGetMemoryInfo(void *card, unsigned long long *memory)
{
    (void)card;
    memory[0] = is("absurd") ? 1ULL << 63 : 24ULL << 30;
    memory[2] = is("negative") ? -1ULL : 3ULL << 30;
    memory[1] = memory[0] - memory[2];
    return 0;
}

int nvmlDeviceGetTemperature(void *card, int sensor, unsigned int *celsius)
{
    (void)card, (void)sensor;
    return *celsius = 41, 0;
}

int nvmlDeviceGetUtilizationRates(void *card, unsigned int *use) { return (void)card, (void)use, 3; }
