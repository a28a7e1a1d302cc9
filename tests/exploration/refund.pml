/* One refund, its journal row, one or two workers, a late gateway: can the refund be made twice?
 *
 * A second model beside model.py: written from the protocol, without the library's code. Time and the number of sends
 * are unbounded: a moment is stored as its distance from now, up to the longest distance that matters. Except for
 * N, V and STOP, any number of ticks may pass between two steps: suspension, a slow database, a slow query.
 *
 * Durations (ticks): N       a request arrives at most N after its bytes left
 *                    V       the record is visible to queries at most V after the refund was made
 *                    GRACE   not_found_grace
 *                    LEASE   length of a lease
 *                    STOP    longest pause between the check of the lease and the sending
 * Scenario:          WORKERS 1: one process and its file, whose lock proves that an earlier process has ended;
 *                            2: two workers on one shared journal
 *                    CRASH   1: a worker's process may be killed at any moment, and starts again; 0: never
 * Faults:            NO_LEASE_CHECK, FIRST_SEND_COUNTS, NOT_FOUND_BELIEVED, NO_MARK
 */
#define NOBODY 2
#define IS_VISIBLE (made && !unseen)

#ifdef NO_LEASE_CHECK /* the lease is not checked before the sending */
#define MAY_SEND true
#else
#define MAY_SEND (lease[w] > 0)
#endif
#ifdef FIRST_SEND_COUNTS /* the grace counts from the first send, not from the last one */
#define COUNTS (!is_sent[w])
#else
#define COUNTS true
#endif
#ifdef NOT_FOUND_BELIEVED /* "no such record" is believed at once */
#define IS_OVER true
#else
#define IS_OVER (age[w] >= GRACE)
#endif
#ifdef NO_MARK /* a resend is not marked in the journal */
#define MARK skip
#else
#define MARK row_age = -row_lease
#endif

mtype = { NEW, OPEN, ENDED } /* the row: nothing was sent, unresolved, outcome known */
mtype = { IDLE, BEGIN, READY, CHECKED, WAITING, ASK, ASKED, NOT_FOUND, DONE } /* a worker */
mtype row = NEW;
byte holder = NOBODY, row_lease;
short row_age; /* time since an attempt may have arrived last; negative: that moment is the end of the lease */

mtype phase[2] = IDLE;
byte lease[2];   /* ticks left, by the worker's own clock */
bool is_sent[2]; /* whether an attempt may have arrived */
short age[2];    /* time since an attempt may have arrived last */
bool is_old[2];  /* whether the grace was over when the query was sent */
bool is_told[2]; /* whether the gateway has answered the worker's request */
byte stop[2];    /* remaining ticks of STOP */

byte fly[2];     /* requests in transit: ticks left + 1; 0: none */
byte from[2];    /* the worker that sent it */
byte unseen;     /* the record is not visible yet: ticks left + 1 */
byte made;

inline end_call(next) {
    phase[w] = next; lease[w] = 0; is_sent[w] = false; age[w] = 0; is_old[w] = false; is_told[w] = false; stop[w] = 0
}
inline free_row() { holder = NOBODY; row_lease = 0 }
inline take_row() { holder = w; row_lease = LEASE; row = OPEN }
inline finish() { row = ENDED; row_age = 0; free_row(); end_call(DONE) }
inline release() {
    if
    :: holder == w && is_sent[w] -> row_age = age[w]; free_row()
    :: holder == w && !is_sent[w] -> row = NEW; row_age = 0; free_row()
    :: else /* another worker has taken the row, or recorded the outcome */
    fi;
    end_call(IDLE)
}
inline send(slot) { fly[slot] = N + 1; from[slot] = w; is_told[w] = false; stop[w] = 0; phase[w] = WAITING }

active [WORKERS] proctype Worker() {
    byte w = _pid;
end:
    do /* Begin: the lease counts from before the request to the database. */
    :: d_step { phase[w] == IDLE -> lease[w] = LEASE; phase[w] = BEGIN }
    :: d_step { phase[w] == BEGIN && row == ENDED -> end_call(DONE) }
    :: d_step { phase[w] == BEGIN && row == NEW -> take_row(); row_age = -LEASE; phase[w] = READY }
    :: d_step { phase[w] == BEGIN && row == OPEN && holder != NOBODY && row_lease -> end_call(IDLE) }
    :: d_step {
        phase[w] == BEGIN && row == OPEN && (holder == NOBODY || !row_lease) ->
        if :: row_age < 0 -> row_age = 0 :: else fi; /* after this no other worker sends */
        take_row(); is_sent[w] = true; age[w] = row_age; phase[w] = ASK
    }
       /* Send. Without a connection, or after the end of the lease, nothing is sent. */
    :: d_step { phase[w] == READY && MAY_SEND -> stop[w] = STOP; phase[w] = CHECKED }
    :: d_step { phase[w] == READY && is_sent[w] -> phase[w] = ASK }
    :: d_step { phase[w] == READY && !is_sent[w] -> release() }
    :: d_step { phase[w] == CHECKED && !fly[0] -> send(0) }
    :: d_step { phase[w] == CHECKED && fly[0] && !fly[1] -> send(1) }
    :: d_step { phase[w] == WAITING && is_told[w] -> finish() }
    :: d_step { phase[w] == WAITING -> if :: COUNTS -> age[w] = 0 :: else fi; is_sent[w] = true; phase[w] = ASK }
       /* Query: the age is compared when the query is sent, not when it is answered. */
    :: d_step { phase[w] == ASK -> is_old[w] = IS_OVER; phase[w] = ASKED }
    :: d_step { phase[w] == ASK -> release() }
    :: d_step { phase[w] == ASKED && IS_VISIBLE -> finish() }
    :: d_step { phase[w] == ASKED && !IS_VISIBLE -> phase[w] = NOT_FOUND }
    :: d_step { phase[w] == NOT_FOUND && !is_old[w] -> phase[w] = ASK }
    :: d_step { phase[w] == NOT_FOUND && is_old[w] && lease[w] && holder == w -> MARK; is_old[w] = 0; phase[w] = READY }
    :: d_step { phase[w] == NOT_FOUND && is_old[w] && !(lease[w] && holder == w) -> release() }
       /* The process is killed and restarted. */
    :: d_step {
        CRASH && phase[w] != IDLE && phase[w] != DONE ->
        if :: WORKERS == 1 && holder == w -> free_row() :: else fi;
        end_call(IDLE)
    }
    od
}

inline arrive(slot) {
    fly[slot] = 0; is_told[from[slot]] = true; from[slot] = 0;
    made++; unseen = V + 1;
    assert(made <= 1)
}

active proctype Gateway() {
end:
    do /* The gateway carries out every request that arrives; a request may also be lost. */
    :: d_step { fly[0] -> arrive(0) }
    :: d_step { fly[1] -> arrive(1) }
    :: d_step { fly[0] -> fly[0] = 0; from[0] = 0 }
    :: d_step { fly[1] -> fly[1] = 0; from[1] = 0 }
    :: d_step { unseen -> unseen = 0 }
    od
}

#define IS_URGENT(i) (fly[i] == 1 || (phase[i] == CHECKED && !stop[i]))

active proctype Clock() {
    byte i;
    do
    :: d_step {
        !IS_URGENT(0) && !IS_URGENT(1) && unseen != 1 ->
        if :: row_lease -> row_lease-- :: else fi;
        if :: row == OPEN && row_age < GRACE -> row_age++ :: else fi;
        if :: unseen -> unseen-- :: else fi;
        for (i : 0 .. 1) {
            if :: fly[i] -> fly[i]-- :: else fi;
            if :: lease[i] -> lease[i]-- :: else fi;
            if :: is_sent[i] && age[i] < GRACE -> age[i]++ :: else fi;
            if :: phase[i] == CHECKED -> stop[i]-- :: else fi
        }
        i = 0
    }
    od
}
