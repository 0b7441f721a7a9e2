#include "jobs.h"

#include <ATen/Parallel.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <mutex>

#include "arguments.h"
#include "deep_stack.h"

namespace engine::jobs {
namespace {

Settings settings{};

constexpr long long kLongestMs = 1000LL * 60 * 60 * 24 * 365;  // a clock goes no further than int64

// Answered exactly once: by the worker that ran it, or by the timekeeper when its time was over.
struct Job {
  std::unique_ptr<Work> work;
  Clock::time_point until;
  server::BlockedClient* client = nullptr;
  std::atomic<bool> answered = false;
};

// What the main thread is told when a client is to be answered.
struct Answer {
  std::shared_ptr<Job> job;
  bool in_time;
};

// The server has timeouts for blocked clients of its own, but answers one not at all whose work
// ends in the very moment when its time is over (seen in Redis 7.0).
void answer_once(const std::shared_ptr<Job>& job, bool in_time) {
  if (job->answered.exchange(true)) return;
  server::UnblockClient(job->client, new Answer{job, in_time});
}

// Answers those whose time is over, whatever their work is at.
class Timekeeper {
 public:
  void add(const std::shared_ptr<Job>& job) {
    const std::lock_guard lock(mutex_);
    if (!started_) start_thread([this] { keep(); });
    started_ = true;
    due_.emplace(job->until, job);
    if (due_.begin()->second.lock() == job) changed_.notify_one();
  }

 private:
  [[noreturn]] void keep() {
    std::unique_lock lock(mutex_);
    while (true) {
      if (due_.empty()) {
        changed_.wait(lock);
      } else if (const auto next = due_.begin()->first; next > Clock::now()) {
        changed_.wait_until(lock, next);
      } else {
        if (const auto job = due_.begin()->second.lock()) answer_once(job, false);
        due_.erase(due_.begin());
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::multimap<Clock::time_point, std::weak_ptr<Job>> due_;
  bool started_ = false;
};

// A fixed number of threads; one whose work is past its time, and hangs in an operation that cannot
// be ended, does not count, so that others go on.
class Workers {
 public:
  void add(std::shared_ptr<Job> job) {
    const std::lock_guard lock(mutex_);
    waiting_.push_back(std::move(job));
    if (alive_ - late() < settings.threads) {
      start_thread([this] { work(); });
      ++alive_;
    }
    arrived_.notify_one();
  }

 private:
  // Ends when there are more threads than there need to be.
  void work() {
    at::set_num_threads(1);  // sums depend on their order, and so on the number of threads
    std::unique_lock lock(mutex_);
    while (alive_ - late() <= settings.threads) {
      if (waiting_.empty()) {
        arrived_.wait(lock);
        continue;
      }
      std::shared_ptr<Job> job = std::move(waiting_.front());
      waiting_.pop_front();
      const auto place = busy_.insert(busy_.end(), job->until);
      lock.unlock();
      if (!job->answered) job->work->run(job->until);
      answer_once(job, Clock::now() < job->until);
      job.reset();
      lock.lock();
      busy_.erase(place);
    }
    --alive_;
  }

  int late() const {
    const auto now = Clock::now();
    return static_cast<int>(
        std::count_if(busy_.begin(), busy_.end(), [&](auto until) { return until < now; }));
  }

  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<std::shared_ptr<Job>> waiting_;
  std::list<Clock::time_point> busy_;  // by when each running job has to be through
  int alive_ = 0;
};

// Never taken apart: their threads outlive everything.
Workers& workers() {
  static auto* instance = new Workers;
  return *instance;
}

Timekeeper& timekeeper() {
  static auto* instance = new Timekeeper;
  return *instance;
}

void answer_late(server::Context* context, const Work& work) {
  if (work.timeout_ms() > 0) {
    server::ReplyWithSimpleString(context, "TIMEDOUT");
  } else {
    server::ReplyWithError(context, "ERR it takes longer than this store allows");
  }
}

int on_answer(server::Context* context, server::String**, int) {
  const auto* answer = static_cast<Answer*>(server::GetBlockedClientPrivateData(context));
  Work& work = *answer->job->work;
  if (!answer->in_time) {
    answer_late(context, work);
    return server::kOk;
  }
  try {
    work.finish(context);
  } catch (const CommandError& error) {
    server::ReplyWithError(context, one_line(error.what()).c_str());
  }
  return server::kOk;
}

void release(server::Context*, void* answer) { delete static_cast<Answer*>(answer); }

// An exit takes the static objects of libtorch apart, newest first, under the hands of the scripts
// that still run. What is asked for last is called first: so the process ends before that.
void end_before_torch_does() {
  on_exit(
      [](int status, void*) {
        std::fflush(nullptr);
        _exit(status);
      },
      nullptr);
}

}  // namespace

void start(server::Context* context, Settings chosen) {
  settings = chosen;
  end_before_torch_does();
  // Again at a shutdown, for the objects that libtorch has made since.
  server::SubscribeToServerEvent(
      context, server::kShutdown,
      [](server::Context*, server::Event, uint64_t, void*) { end_before_torch_does(); });
}

bool may_block(server::Context* context) {
  const int nested = server::kInScript | server::kInTransaction | server::kMustNotBlock;
  return (server::GetContextFlags(context) & nested) == 0;
}

void submit(server::Context* context, std::unique_ptr<Work> work) {
  const long long timeout_ms = work->timeout_ms();
  const std::chrono::milliseconds limit(
      std::min(timeout_ms > 0 ? timeout_ms : settings.limit_ms, kLongestMs));
  auto job = std::make_shared<Job>(std::move(work), Clock::now() + limit);
  job->client = server::BlockClient(context, on_answer, nullptr, release, 0);
  timekeeper().add(job);
  workers().add(std::move(job));
}

}  // namespace engine::jobs
