# The end of every step's script. Above it are its variables and the function `step`, which becomes srun. No variable
# here is readonly: in the process that becomes srun, one of the user's may have the same name.
set -uo pipefail
RESTARTS="${SLURM_RESTART_COUNT:-0}"
# More than the 2 x 5 seconds in which a start looks whether there is a newer one.
SILENT="${SLIPWAY_SILENT:-20}"
export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" # srun itself would give a task one processor

say() { echo "slipway: $*" >&2; }

# Ends the job. What lies in STATE.exit is how `slipway submit status` knows it, also where Slurm has forgotten the job.
end() {
    rm -f "$STATE.alive"
    echo "$1 $(date +%s)" >"$STATE.exit.part" && mv "$STATE.exit.part" "$STATE.exit"
    exit "$1"
}

# The names in the file of secrets go to the container too; `step` reads the values, for its own process alone.
secrets() {
    [ -n "$SECRETS" ] || return 0
    case "$(stat -L -c '%a %u' "$SECRETS" 2>&1)" in
    [46]"00 $(id -u)") ;;
    *) say "$SECRETS must be a file of yours with mode 600: chmod 600 $SECRETS" && end 78 ;;
    esac
    local names
    names=$(sed -nE 's/^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=.*/\2/p' "$SECRETS" | paste -sd,)
    NAMES="$NAMES${names:+${NAMES:+,}$names}"
}

# A node that is cut off may still run the start before this one. Each start writes its name, and ends as soon as it
# reads another one; the new start waits until the old one shows no sign of life.
take_over() {
    rm -f "$STATE.exit"
    echo "$ME" >"$STATE.start.part" && mv "$STATE.start.part" "$STATE.start" || end 73
    local seen
    while seen=$(stat -c %y "$STATE.alive" 2>/dev/null); do
        sleep "$SILENT"
        [ "$seen" != "$(stat -c %y "$STATE.alive" 2>/dev/null)" ] || break
        say "the start before this one still runs on $(cat "$STATE.alive"); waiting for its end"
    done
    is_newest || exit 0
    echo "$(date +%s) $SLURM_JOB_ID $RESTARTS $SLURM_JOB_NODELIST" >>"$STATE.starts"
}

is_newest() {
    local name
    name=$(cat "$STATE.start" 2>/dev/null) && [ -n "$name" ] && [ "$name" != "$ME" ] && return 1
    return 0
}

# Signs of life while srun lives. After 60 s a start that was overtaken is killed, and so is an srun that hears nothing.
watch_over() {
    local overtaken=0 unheard=0
    while kill -0 "$1" 2>/dev/null; do
        hostname >"$STATE.alive"
        if ! is_newest; then
            [ "$overtaken" -gt 0 ] || say "another start has begun; this one ends"
            if [ "$overtaken" -lt 12 ]; then signal TERM; else signal KILL && kill -KILL "$1"; fi
            overtaken=$((overtaken + 1))
        fi
        ! ends_the_step || unheard=$((unheard + 1))
        if [ "$unheard" -gt 12 ]; then
            say "srun has ended the step, but waits for a node that cannot be heard; it is killed"
            touch "$STATE.unheard" && kill -KILL "$1"
        fi
        sleep 5
    done
}

# srun has said so, in what this start has printed. If a node's network was cut as its tasks ended, srun waits for ever.
ends_the_step() {
    local size from
    size=$(stat -c %s "$STATE.log" 2>/dev/null || echo 0)
    from=$((size > begins + 65536 ? size - 65536 : begins))
    tail -c "+$((from + 1))" "$STATE.log" 2>/dev/null | grep -q '^srun: First task exited'
}

# To the tasks of this node, by their numbers: the controller may be out of reach, and scancel and srun need it.
signal() {
    local pid step
    scontrol listpids "$SLURM_JOB_ID" | while read -r pid _ step _; do
        case "$pid $step" in *[!0-9]*" "* | *" batch" | *" extern") ;; *) kill "-$1" "$pid" 2>/dev/null ;; esac
    done
}

# Runs the step; its exit code is in `code`. Where the controller was away, srun did not start it, and tries again.
run_step() {
    local work watcher tries begins
    for tries in $(seq 60); do
        begins=$(stat -c %s "$STATE.log" 2>/dev/null || echo 0)
        (trap - TERM USR1 && step) &
        work=$!
        watch_over "$work" &
        watcher=$!
        wait "$work"
        code=$?
        kill -KILL "$watcher" 2>/dev/null
        wait "$watcher" 2>/dev/null
        is_newest || exit 0
        [ ! -e "$STATE.unheard" ] || { rm -f "$STATE.unheard" && code=69; }
        echo "$code $(date +%s)" >"$STATE.last"
        [ "$code" -ne 0 ] && tail -c "+$((begins + 1))" "$STATE.log" | grep -qE "$NOT_STARTED" || return
        [ ! -e "$STATE.stop" ] || return
        # Slurm answers, but nothing starts in what it has given: a node was lost as it did. Another allocation may do.
        if [ "$tries" -ge 12 ] && is_running; then code=69 && return; fi
        say "srun could not start the step (try $tries); trying again"
        sleep 10
    done
}
NOT_STARTED='^srun: error: Unable to (create step|confirm allocation|contact slurm controller)'

again() {
    if [ -e "$STATE.stop" ]; then say "stopped on request: the job is not queued again" && end "$1"; fi
    if [ "$RESTARTS" -ge "$MOST_RESTARTS" ]; then say "was queued again $RESTARTS times, the most" && end "$1"; fi
    rm -f "$STATE.alive"
    local said tries
    for tries in $(seq 360); do
        said=$(requeue 2>&1)
        case "$?" in
        0 | 1[2-9][0-9]) (trap - TERM && exec sleep 60); exit "$1" ;; # Slurm ends this script meanwhile; it may have ended scontrol too
        3) exit "$1" ;;
        esac
        case "$said" in *[Cc]ontact* | *timed\ out* | *onnect*) sleep 10 ;; *) break ;; esac
    done
    say "not queued again: $said"
    end "$1"
}

# 3 where Slurm is ending this start already: the job was cancelled, Slurm has queued it again itself, or it has forgotten
# the job, and may have given its number to one of another run. 1: it is not known.
is_running() {
    local job
    job=$(scontrol -o show job "$SLURM_JOB_ID" 2>&1) || {
        [[ $job != *"Invalid job id"* ]] || return 3
        echo "$job" >&2
        return 1
    }
    [[ $job == *"$COMMAND"* ]] || return 3
    [[ $job == *" JobState="@(RUNNING|SIGNALING)" "* ]] || return 3 # SIGNALING while TERM or USR1 is on its way
}

# A job that was cancelled must not come again, though Slurm would let it.
requeue() { is_running && scontrol requeue "$SLURM_JOB_ID"; }

# Slurm itself sees a lost node only after SlurmdTimeout, so the nodes are asked: one that is gone does not answer.
lost_nodes() {
    local node
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        [ "$node" != "$SLURMD_NODENAME" ] || continue
        { timeout -k 5 60 srun --overlap --nodes=1 --ntasks=1 --cpus-per-task=1 --gpus=0 --nodelist="$node" --immediate=30 true \
            >/dev/null 2>&1 || echo "$node"; } &
        [ "$(jobs -rp | wc -l)" -lt 32 ] || wait -n
    done
    wait
}

without_lost_nodes() {
    local lost excluded
    lost=$(lost_nodes | paste -sd,)
    is_running || return # else no node of it answers
    excluded=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p' | grep -v '(null)')
    excluded="$lost${lost:+${excluded:+,}}$excluded"
    [ -z "$excluded" ] || scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$excluded"
    say "nodes that do not answer: ${lost:-none}"
}

lost_a_node() {
    echo "$(date +%s) $SLURM_JOB_NODELIST" >>"$STATE.losses"
    if [ "$(wc -l <"$STATE.losses")" -gt "$MOST_LOSSES" ]; then say "lost a node $MOST_LOSSES times, the most" && end "$1"; fi
    without_lost_nodes
    again "$1"
}

ME="$SLURM_JOB_ID.$RESTARTS.$$@$(hostname)"
COMMAND="${STATE#"${STATE%/*/*}"}.sbatch " # the end of Command= in what Slurm says of this job: /RUN/STEP.sbatch
# For the tasks of srun; this script ends after them. Not with a command: bash 5.2 can break off what it reads meanwhile.
trap '' TERM USR1
secrets
take_over
run_step
case "$code" in
75) again 75 ;;
69) lost_a_node 69 ;;
# USR1 before the time limit, TERM before a pre-emption: these commands do not heed them, and go on where they were.
138 | 143) [ "$VERB" = train ] || again "$code" ;;
esac
# A command that Slurm itself has ended, for a pre-emption or at scancel, has not failed: Slurm knows what comes next. One
# that it has forgotten left its code in STATE.last.
[ "$code" -eq 0 ] || is_running
[ "$?" -ne 3 ] || { rm -f "$STATE.alive" && exit "$code"; }
end "$code"
