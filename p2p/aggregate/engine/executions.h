// AI.SCRIPTEXECUTE and AI.DAGEXECUTE: a plan is run, its result stored and answered.
#pragma once

#include "jobs.h"
#include "plans.h"

namespace engine {

class Execution final : public jobs::Work {
 public:
  // On behalf of the client of the context.
  Execution(server::Context* context, Plan plan);

  long long timeout_ms() const override { return plan_.timeout_ms; }
  void run(Clock::time_point until) override { plan_.run(commands_, until); }
  void finish(server::Context* context) override;

 private:
  Plan plan_;
  Commands commands_;
};

}  // namespace engine
