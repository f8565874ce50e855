# Reads what the consoles of emulated machines show (scripts/lib/qemu-init) and prints a table: a row for each test program, a
# column for each machine. Then what failed and what was skipped, by name. Is a failure if anything failed or is missing.
#
# usage: awk -v left_out=PATTERN -f qemu-table.awk MACHINE...
#
# MACHINE.tests names the programs it was to run, MACHINE.log is its console. Programs that match the pattern were left out.

function complain(machine, text) {
    problems[++n_problems] = machine ": " text
}

function read_machine(path, machine,    line, word, n, program, test) {
    while ((getline line < (path ".tests")) > 0) {
        if (!(line in known)) {
            known[line]
            programs[++n_programs] = line
        }
        cell[machine, line] = left_out != "" && line ~ left_out ? "left out" : "not run"
    }
    program = ""
    while ((getline line < (path ".log")) > 0) {
        sub(/\r$/, "", line)
        if (match(line, /^@ up .*/)) {
            n = split(line, word, " ")
            release[machine] = word[3]
            # The module says Y or 1, N or 0.
            if ((word[4] ~ /^[Y1]$/) != (machine ~ /nested$/))
                complain(machine, "KVM does not use the paging that was asked for")
            if (word[5] != "kvm")
                complain(machine, "there is no /dev/kvm")
            if (word[6] != "swap")
                complain(machine, "there is no swap")
        } else if (match(line, /^@ begin /)) {
            program = substr(line, RLENGTH + 1)
            passed = failed = skipped = 0
            counted = ""
            cell[machine, program] = "NO END"
        } else if (match(line, /@ end [a-z0-9_]+ [0-9]+ [0-9]+$/)) {
            n = split(line, word, " ")
            seconds[machine] += word[n]
            finish(machine, program, word[n - 1])
        } else if (match(line, /^@ over/)) {
            over[machine]
        } else if (match(line, /^SKIPPED /)) {
            skipped++
            skips[++n_skips] = machine " " program ": " substr(line, RLENGTH + 1)
        } else if (match(line, /^test result: /)) {
            counted = line
        } else if (match(line, /^test .*FAILED$/)) {
            complain(machine, program ": " line)
        }
    }
    if (!(machine in release))
        complain(machine, "did not boot")
    else if (!(machine in over))
        complain(machine, "did not come to its end")
}

function number_of(what, line) {
    return match(line, "[0-9]+ " what) ? substr(line, RSTART, RLENGTH) + 0 : 0
}

function finish(machine, program, status,    text) {
    failed = number_of("failed", counted)
    skipped += number_of("ignored", counted)
    # A test that says that it is skipped counts as passed with the test harness.
    passed = number_of("passed", counted) - (skipped - number_of("ignored", counted))
    text = passed " passed"
    if (skipped > 0)
        text = text ", " skipped " skipped"
    if (failed > 0)
        text = text ", " failed " FAILED"
    if (counted == "")
        text = status == 124 || status == 137 || status == 143 ? "TIMED OUT" : "DIED (" status ")"
    else if (status != 0 && failed == 0)
        text = text ", DIED (" status ")"
    if (status != 0)
        complain(machine, program ": " text)
    cell[machine, program] = text
}

BEGIN {
    for (i = 1; i < ARGC; i++) {
        machines[i] = ARGV[i]
        sub(/.*\//, "", machines[i])
        read_machine(ARGV[i], machines[i])
    }
    first = 7
    for (p = 1; p <= n_programs; p++)
        if (length(programs[p]) > first)
            first = length(programs[p])
    printf "\n%-*s", first, "program"
    for (i = 1; i < ARGC; i++) {
        width[i] = length(machines[i])
        for (p = 1; p <= n_programs; p++)
            if (length(cell[machines[i], programs[p]]) > width[i])
                width[i] = length(cell[machines[i], programs[p]])
        printf "  %-*s", width[i], machines[i]
    }
    printf "\n"
    for (p = 1; p <= n_programs; p++) {
        printf "%-*s", first, programs[p]
        for (i = 1; i < ARGC; i++) {
            # A machine whose paging makes no difference to the program does not run it.
            text = cell[machines[i], programs[p]]
            if (text == "")
                text = "-"
            if (text == "not run" || text == "NO END")
                complain(machines[i], programs[p] ": " text)
            printf "  %-*s", width[i], text
        }
        printf "\n"
    }
    printf "%-*s", first, "seconds"
    for (i = 1; i < ARGC; i++)
        printf "  %-*s", width[i], seconds[machines[i]]
    printf "\n\n"
    for (i = 1; i <= n_skips; i++)
        print "skipped: " skips[i]
    for (i = 1; i <= n_problems; i++)
        print "FAILED: " problems[i]
    if (n_problems > 0)
        exit 1
    print "no test failed"
}
