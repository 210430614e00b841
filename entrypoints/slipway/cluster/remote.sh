# What `slipway submit` runs on the login node, as text over ssh; variables and a call of `main` follow it.
# A record is a line: slipway, a tab, its kind, and fields with tabs between. Everything else is text for people.
# shellcheck disable=SC2015 # what stands behind || is for both
set -uo pipefail
THEIR_LC_ALL="${LC_ALL-}" # of the jobs
export LC_ALL=C

record() { local IFS=$'\t'; printf 'slipway\t%s\n' "$*"; }

# Ends with a sentence for the person, and the exit code of `slipway submit`.
refuse() { record refused "$1" "${*:2}"; exit 0; }

one_line() { tr '\n\t' '  ' | sed 's/  */ /g; s/ $//'; }

main() {
    forget_variables
    "$@"
    record end
    exit 0
}

# Slurm's commands read variables before the flags of a script, and a job inherits those of the job that submits it. So a
# login shell could move a step, take its [env] away or hide it from squeue. Left are those that say where Slurm is, and
# what lab.toml may leave open.
forget_variables() {
    local name
    for name in "${!SLURM_@}" "${!SBATCH_@}" "${!SRUN_@}" "${!SQUEUE_@}" "${!SINFO_@}" "${!SACCT_@}" "${!SCANCEL_@}" "${!SCONTROL_@}"; do
        case "$name" in
        SLURM_CONF* | SLURM_CLUSTERS | SLURM_JWT* | SLURM_SACK_*) ;;
        SBATCH_ACCOUNT | SBATCH_PARTITION | SBATCH_QOS | SBATCH_RESERVATION | SBATCH_CONSTRAINT | SBATCH_WCKEY) ;;
        *) unset "$name" ;;
        esac
    done
}

# sbatch for a script: what that says itself counts, and not the person's variable of the same name.
sbatch_with() { # SCRIPT FLAGS…
    (
        local name flag
        for name in "${!SBATCH_@}"; do
            flag="${name#SBATCH_}"
            [[ $1 != *$'\n'"#SBATCH --${flag,,}="* ]] || unset "$name"
        done
        LC_ALL="$THEIR_LC_ALL"
        [ -n "$LC_ALL" ] || unset LC_ALL
        exec sbatch "${@:2}" 2>&1
    )
}

# ------------------------------------------------------------------- submit

submit() {
    trap '' HUP PIPE INT # a client that goes away leaves a whole chain or none
    command -v sbatch >/dev/null || refuse 78 "there is no sbatch on $(hostname); host in lab.toml must be a login node of Slurm"
    local i said
    said=$(answers) || refuse 78 "Slurm's controller does not answer: $said; nothing was submitted"
    check_files
    fit_to_the_nodes
    for i in "${!NAMES[@]}"; do
        said=$(sbatch_with "${SCRIPTS[i]}" --test-only ${CPUS[i]:+--cpus-per-task=${CPUS[i]}} <<<"${SCRIPTS[i]}") ||
            refuse 78 "${NAMES[i]#*-}: Slurm refuses the job: $(sbatch_says "$said"); nothing was submitted"
    done
    # Private by its own mode: a umask would be that of the jobs too, and nobody else could read a model that they write.
    mkdir -m 700 "$DIR" 2>/dev/null || refuse 78 "$DIR cannot be made on $(hostname); give a job_dir that you can write to"
    for i in "${!NAMES[@]}"; do queue "$i"; done
    printf '%s' "$META" >"$DIR/run.json.part" && mv "$DIR/run.json.part" "$DIR/run.json" || undo "$DIR cannot be written"
    # Held until all are there: a chain that was submitted in part never begins.
    said=$(scontrol release "${IDS[0]}" 2>&1) || undo "Slurm does not release the first job: $(one_line <<<"$said")"
    record submitted "${IDS[@]}"
}

# The commands of Slurm wait for a minute for a controller that is away; this one does not.
answers() {
    local said
    said=$(timeout 15 scontrol ping 2>&1 | one_line)
    [[ $said == *UP* ]] || { echo "${said:-scontrol ping says nothing}"; return 1; }
}

check_files() {
    local path
    (umask 077 && mkdir -p "$JOB_DIR" 2>/dev/null) && [ -w "$JOB_DIR" ] ||
        refuse 78 "$JOB_DIR cannot be made or written on $(hostname); give a job_dir of yours"
    for path in "${SOURCES[@]}"; do
        [ -e "$path" ] || refuse 78 "$path is not there on $(hostname), but mounts names it: make it with mkdir (or name it in local_mounts, if it is on the nodes alone)"
    done
    for path in "${IMAGES[@]}"; do
        [ -r "$path" ] || refuse 78 "the image $path is not there on $(hostname); make it with \`build.py sqsh\` and copy it there"
    done
    [ -z "$SECRETS" ] || case "$(stat -L -c '%a %u' "$SECRETS" 2>&1)" in
    [46]"00 $(id -u)") ;;
    *) refuse 78 "the file of secrets, $SECRETS, must be yours on $(hostname), with mode 600: chmod 600 $SECRETS" ;;
    esac
    # Else each secret ends with one, and who sends it shows it in the message of an error.
    [ -z "$SECRETS" ] || ! grep -q $'\r' -- "$SECRETS" ||
        refuse 78 "the file of secrets, $SECRETS, has line ends of Windows on $(hostname): take them out with sed -i 's/\\r//' $SECRETS"
}

# CPUS[i] is empty for a step with GPUs; else what it asks for, at most what the smallest node has.
fit_to_the_nodes() {
    local i smallest
    for i in "${!CPUS[@]}"; do
        [ -n "${CPUS[i]}" ] || continue
        smallest=$(sinfo -h -N -o %c ${PARTITIONS[i]:+-p "${PARTITIONS[i]}"} 2>/dev/null | sort -n | head -1)
        [[ ! $smallest =~ ^[0-9]+$ || $smallest -ge ${CPUS[i]} ]] || CPUS[i]=$smallest
    done
}

# The one line of several that says what is wrong.
sbatch_says() {
    local line
    line=$(grep -m 1 'error' <<<"$1" || tail -n 1 <<<"$1")
    sed 's/^sbatch: //; s/^error: //; s/^Batch job submission failed: //; s/^allocation failure: //' <<<"$line" | one_line
}

queue() { # NUMBER
    local file="$DIR/${NAMES[$1]}.sbatch" said id
    printf '%s' "${SCRIPTS[$1]}" >"$file" && printf '%s' "${OUTS[$1]}" >"$DIR/${NAMES[$1]}.out" || undo "$DIR cannot be written"
    local after=(--hold)
    [ "$1" -eq 0 ] || after=("--dependency=afterok:${IDS[$1 - 1]}" --kill-on-invalid-dep=yes)
    said=$(sbatch_with "${SCRIPTS[$1]}" --parsable "${after[@]}" ${CPUS[$1]:+--cpus-per-task=${CPUS[$1]}} "$file") ||
        undo "${NAMES[$1]#*-}: Slurm refuses the job: $(sbatch_says "$said")"
    id=$(grep -oE '^[0-9]+(;.*)?$' <<<"$said" | tail -1)
    IDS+=("${id%%;*}")
    echo "${id%%;*}" >"$DIR/${NAMES[$1]}.id"
}

undo() {
    [ "${#IDS[@]}" -eq 0 ] || scancel "${IDS[@]}"
    rm -rf -- "$DIR"
    refuse 78 "$*; nothing was submitted"
}

# ------------------------------------------------------------------- a run that was submitted

# DIR of the run that is asked for, or of the newest.
find_run() {
    [ -d "$JOB_DIR" ] || refuse 2 "there is no run yet: $JOB_DIR is not there on $(hostname)"
    [ -n "$RUN" ] || RUN=$(runs | tail -n 1)
    [ -n "$RUN" ] || refuse 2 "there is no run yet in $JOB_DIR on $(hostname)"
    DIR="$JOB_DIR/$RUN"
    [ -d "$DIR" ] || refuse 2 "there is no run $RUN in $JOB_DIR on $(hostname); the newest are $(runs | tail -n 3 | paste -sd' ')"
    IDS=()
    local name
    mapfile -t NAMES < <(find "$DIR" -maxdepth 1 -name '*.id' -printf '%f\n' | sort -n) # 10-export comes after 2-train
    NAMES=("${NAMES[@]%.id}")
    for name in "${NAMES[@]}"; do IDS+=("$(cat "$DIR/$name.id")"); done
    record run "$RUN"
}

runs() { find "$JOB_DIR" -mindepth 1 -maxdepth 1 -type d -name '[0-9]*-[0-9]*-*' -printf '%f\n' | sort; }

joined() { local IFS=,; echo "$*"; }

# Of lines ID|…|SCRIPT those of this run: a controller that was killed may have given an id to another job since.
of_this_run() {
    local line i
    while IFS= read -r line; do
        for i in "${!NAMES[@]}"; do
            [[ $line != "${IDS[i]}|"*"/$RUN/${NAMES[i]}.sbatch" ]] || echo "$line"
        done
    done
}

# What Slurm says of the job of a step; nothing where it has forgotten it.
state_of() { # NUMBER
    local said
    said=$(squeue -h -t all -j "${IDS[$1]}" -o '%i|%T|%o' 2>&1) || { [[ $said == *"Invalid job id"* ]] || echo UNKNOWN; return; }
    of_this_run <<<"$said" | cut -d'|' -f2
}

status() {
    find_run
    record now "$(date +%s)"
    record meta "$(base64 -w0 "$DIR/run.json" 2>/dev/null)"
    local said i state gone=() queue=
    if ! said=$(answers); then
        record silent "$said"
    elif ! queue=$(squeue -h -t all -j "$(joined "${IDS[@]}")" -o '%i|%T|%r|%N|%M|%l|%S|%o' 2>&1); then
        grep -q 'Invalid job id' <<<"$queue" || record silent "$(one_line <<<"$queue")"
        queue=
    fi
    queue=$(of_this_run <<<"$queue")
    for i in "${!NAMES[@]}"; do
        state="$DIR/${NAMES[i]}"
        record step "${NAMES[i]}" "${IDS[i]}" "$(cat "$state.exit" 2>/dev/null)" "$(marks "$state")" \
            "$(cat "$state.last" 2>/dev/null)" "$(wc -l 2>/dev/null <"$state.starts" || echo 0)"
        grep "^${IDS[i]}|" <<<"$queue" | while IFS='|' read -r _ job reason nodes elapsed limit begins _; do
            record queue "${NAMES[i]}" "$job" "$reason" "$nodes" "$elapsed" "$limit" "$begins"
        done
        [ -e "$state.exit" ] || grep -q "^${IDS[i]}|" <<<"$queue" || gone+=("${IDS[i]}")
        said=$(cat "$state.out" 2>/dev/null)
        [ -z "$said" ] || [ ! -r "$said/status.json" ] || record progress "${NAMES[i]}" "$said" "$(base64 -w0 "$said/status.json")"
    done
    # Without accounting, sacct fails: then nothing more is known.
    [ "${#gone[@]}" -eq 0 ] || timeout 10 sacct -n -P -X -j "$(joined "${gone[@]}")" -o JobID,State 2>/dev/null |
        while IFS='|' read -r id job; do record sacct "$id" "${job%% *}"; done
}

marks() { # what a person did to a step
    local mark
    for mark in cancelled stop; do [ ! -e "$1.$mark" ] || echo "$mark"; done | paste -sd,
}

# The step that WANTED names, or the newest that has printed something.
find_log() {
    local i
    LOG=
    for i in "${!NAMES[@]}"; do
        case "$WANTED" in
        "") [ ! -e "$DIR/${NAMES[i]}.log" ] || LOG="$DIR/${NAMES[i]}.log" ;;
        "${NAMES[i]}" | "${NAMES[i]#*-}" | "${NAMES[i]%%-*}") LOG="$DIR/${NAMES[i]}.log" ;;
        esac
    done
    [ -n "$LOG" ] || [ -z "$WANTED" ] || refuse 2 "the run $RUN has no step $WANTED; there are $(joined "${NAMES[@]#*-}")"
}

logs() {
    find_run
    find_log
    [ -n "$LOG" ] && [ -e "$LOG" ] || refuse 2 "the run $RUN has printed nothing yet; see \`slipway submit status\`"
    tail -n "$LINES_SHOWN" "$LOG"
}

# Prints what the logs get and how far a run is, until all steps have ended.
follow() {
    find_run
    exec 3<&0
    { cat <&3 >/dev/null; kill $$; } & # the client has gone
    trap 'kill $(jobs -p) 2>/dev/null' EXIT
    local -A shown=() told=()
    local turn=0 i state size progress
    while true; do
        for i in "${!NAMES[@]}"; do
            state="$DIR/${NAMES[i]}"
            size=$(stat -c %s "$state.log" 2>/dev/null || echo 0)
            if [ "$size" -gt "${shown[$i]:-0}" ]; then
                [ "${told[log]:-}" = "$i" ] || record heading "${NAMES[i]}" "${IDS[i]}"
                told[log]=$i
                tail -c "+$((${shown[$i]:-0} + 1))" "$state.log" | head -c "$((size - ${shown[$i]:-0}))"
                shown[$i]=$size
            fi
            progress=$(cat "$(cat "$state.out" 2>/dev/null)/status.json" 2>/dev/null | base64 -w0)
            if [ -n "$progress" ] && [ "$progress" != "${told[$i]:-}" ] && [ $((turn % 5)) -eq 0 ] && [ ! -e "$state.exit" ]; then
                told[$i]=$progress
                record progress "${NAMES[i]}" "$(cat "$state.out")" "$progress"
            fi
        done
        has_ended $((turn % 15)) && return
        turn=$((turn + 1))
        sleep 1
    done
}

# Whether no step will do anything more; Slurm is asked only where TURN is 0.
has_ended() { # TURN
    local i open=()
    for i in "${!NAMES[@]}"; do [ -e "$DIR/${NAMES[i]}.exit" ] || open+=("${IDS[i]}"); done
    local said
    if [ "${#open[@]}" -eq 0 ]; then
        said=$(squeue -h -t PD -j "$(joined "${IDS[@]}")" -o '%i|%o' 2>/dev/null)
        [ -n "$(of_this_run <<<"$said")" ] || return 0
        sleep 5 # a job that has left its code is queued again
        return 1
    fi
    [ "$1" -eq 0 ] || return 1
    answers >/dev/null || return 1
    said=$(squeue -h -j "$(joined "${open[@]}")" -o '%i|%r|%o' 2>&1) || [[ $said == *"Invalid job id"* ]] || return 1
    said=$(of_this_run <<<"$said")
    # What Slurm has kept of a chain that it has forgotten in part stays held for ever, and so does what waits for it.
    [ "$(grep -c . <<<"$said")" -eq "${#open[@]}" ] || said=$(grep -vE '\|(JobHeld|Dependency)' <<<"$said")
    [ -z "$said" ]
}

# Every job that goes saves and ends; those that have not begun are taken out of the queue.
stop() {
    find_run
    local i state said
    said=$(answers) || refuse 78 "Slurm's controller does not answer: $said; try again"
    for i in "${!NAMES[@]}"; do [ -e "$DIR/${NAMES[i]}.exit" ] || touch "$DIR/${NAMES[i]}.stop"; done
    for ((i = ${#NAMES[@]} - 1; i >= 0; i--)); do
        [ ! -e "$DIR/${NAMES[i]}.exit" ] || continue
        state=$(state_of "$i")
        case "$state" in
        "") ;;
        RUNNING | SUSPENDED)
            scontrol update "JobId=${IDS[i]}" Requeue=0 >/dev/null 2>&1
            scancel --signal=USR1 "${IDS[i]}" && record stopping "${NAMES[i]}" "${IDS[i]}"
            ;;
        *) scancel "${IDS[i]}" >/dev/null 2>&1 && record taken "${NAMES[i]}" "${IDS[i]}" ;;
        esac
    done
}

cancel() {
    find_run
    local i said
    said=$(answers) || refuse 78 "Slurm's controller does not answer: $said; try again"
    for ((i = ${#NAMES[@]} - 1; i >= 0; i--)); do
        [ ! -e "$DIR/${NAMES[i]}.cancelled" ] && [ -n "$(state_of "$i")" ] || continue
        # A controller that was killed may have forgotten that this job has run.
        if [ -e "$DIR/${NAMES[i]}.exit" ]; then scancel "${IDS[i]}" 2>/dev/null; continue; fi
        touch "$DIR/${NAMES[i]}.stop"
        scancel "${IDS[i]}" 2>/dev/null && touch "$DIR/${NAMES[i]}.cancelled" && record taken "${NAMES[i]}" "${IDS[i]}"
    done
}
