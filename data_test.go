package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const dataToken = "kept" // without one the gateway looks for the user of each caller, which takes longer than all the rest

// keeping is a gateway with --data.
type keeping struct {
	*running
	client *http.Client
}

func keep(t *testing.T, dir string, args ...string) *keeping {
	t.Helper()
	k := &keeping{running: launch(t, []string{"KERBEROS_TOKEN=" + dataToken, "KERBEROS_DATA=" + dir}, args...)}
	transport := &http.Transport{MaxIdleConnsPerHost: 100}
	t.Cleanup(transport.CloseIdleConnections)
	k.client = &http.Client{Transport: transport, Timeout: 15 * time.Second}
	return k
}

// call is one of the API on the admin listener.
func (k *keeping) call(method, path, body string) (status int, answer string, err error) {
	req, err := http.NewRequest(method, "http://"+k.admin+path, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Authorization", "Bearer "+dataToken)
	req.Header.Set("Content-Type", "application/json")
	response, err := k.client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return response.StatusCode, string(text), err
}

// kept is what /services says of an instance that is to outlast the gateway.
type kept struct {
	Addr     string
	Weight   int
	Override *struct{ Weight *int }
	Lease    *struct{ TTL string }
	Metadata map[string]string

	State      string
	Generation uint64
}

// services is all instances by service/id.
func (k *keeping) services() map[string]kept {
	k.t.Helper()
	status, text, err := k.call(http.MethodGet, "/services", "")
	if err != nil || status != http.StatusOK {
		k.t.Fatalf("%d %s %v", status, text, err)
	}
	var list struct {
		Services []struct {
			Name      string
			Instances []struct {
				ID string
				kept
			}
		}
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		k.t.Fatal(err)
	}
	all := map[string]kept{}
	for _, s := range list.Services {
		for _, in := range s.Instances {
			all[s.Name+"/"+in.ID] = in.kept
		}
	}
	return all
}

func (k *keeping) kill() {
	k.signal(syscall.SIGKILL)
	<-k.ended
}

// wanted is what a caller knows of one of its instances: the text is all that was acknowledged of it, empty if unregistered.
type wanted struct {
	addr, ttl, zone  string
	weight, override int // 0: none
}

func (k kept) wanted() wanted {
	w := wanted{addr: k.Addr, zone: k.Metadata["zone"], weight: k.Weight}
	if k.Override != nil && k.Override.Weight != nil {
		w.override = *k.Override.Weight
	}
	if k.Lease != nil {
		w.ttl = k.Lease.TTL
	}
	return w
}

// inForce is what can be seen of w.
func (w wanted) inForce() wanted {
	if w.override != 0 {
		w.weight = w.override
	}
	return w
}

// Whatever has been acknowledged is there after kill -9, nothing acknowledged to be gone comes back, and generations grow.
func TestKillLoop(t *testing.T) {
	rounds := 500
	if testing.Short() || raceDetector {
		rounds = 30
	}
	const callers, perCaller = 6, 3
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for conn, err := ln.Accept(); err == nil; conn, err = ln.Accept() {
			conn.Close()
		}
	}()
	alive := "http://" + ln.Addr().String()
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(7, 8))
	state := map[string]*wanted{} // by service/id; nil: unregistered
	possible := map[string]*wanted{}
	highest := uint64(0)
	var acknowledged atomic.Int64
	began := time.Now()
	for round := range rounds {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			g := keep(t, dir, "--drain-timeout=0s")
			got := g.services()
			delete(got, "held/a")
			next := highest
			for name, in := range got {
				if in.Generation <= highest {
					t.Errorf("%s has generation %d after %d", name, in.Generation, highest)
				}
				next = max(next, in.Generation)
				if in.State != "up" {
					t.Errorf("%s is %s", name, in.State)
				}
				if _, known := state[name]; !known && possible[name] == nil {
					t.Errorf("%s was never registered", name)
				}
			}
			highest = next
			for _, name := range names(state, possible) {
				want, maybe := state[name], possible[name]
				in, there := got[name]
				_, unfinished := possible[name]
				switch {
				case want == nil && !there, want != nil && there && in.wanted() == want.inForce():
				case unfinished && maybe == nil && !there, maybe != nil && there && in.wanted() == maybe.inForce():
					state[name] = maybe
				default:
					t.Errorf("%s: want %+v or %+v, got %v %+v", name, want, maybe, there, in)
				}
			}
			clear(possible)

			var mu sync.Mutex // guards state and possible
			var working sync.WaitGroup
			for c := range callers {
				seed := rng.Uint64()
				working.Go(func() {
					rng := rand.New(rand.NewPCG(seed, 1))
					for {
						name := fmt.Sprintf("service-%d/%d", c%3, c*perCaller+rng.IntN(perCaller))
						mu.Lock()
						now := state[name]
						mu.Unlock()
						method, path, body, next := something(rng, name, now, alive)
						mu.Lock()
						possible[name] = next
						mu.Unlock()
						status, text, err := g.call(method, path, body)
						if err != nil {
							return // it is not known whether it was done
						}
						if status != http.StatusNoContent {
							t.Errorf("%s %s %s: %d %s", method, path, body, status, text)
							return
						}
						acknowledged.Add(1)
						mu.Lock()
						state[name] = next
						delete(possible, name)
						mu.Unlock()
					}
				})
			}
			pause := time.Duration(rng.IntN(40_000)) * time.Microsecond
			generation := holdOnce(g)
			if generation > 0 && generation <= highest {
				t.Errorf("generation %d after %d", generation, highest)
			}
			highest = max(highest, generation)
			time.Sleep(pause)
			g.kill()
			working.Wait()
		})
		if t.Failed() {
			return
		}
	}
	t.Logf("%d rounds of %v, %d changes acknowledged, the last generation seen is %d", rounds, (time.Since(began) / time.Duration(rounds)).Round(time.Millisecond), acknowledged.Load(), highest)
}

func names(maps ...map[string]*wanted) []string {
	var all []string
	for _, m := range maps {
		for name := range m {
			all = append(all, name)
		}
	}
	return all
}

// something is a call about an instance, and what it is after it; nil is unregistered.
func something(rng *rand.Rand, name string, now *wanted, alive string) (method, path, body string, next *wanted) {
	service, id, _ := strings.Cut(name, "/")
	switch n := rng.IntN(4); {
	case n == 0 && now != nil:
		return http.MethodDelete, "/register", fmt.Sprintf(`{"service":%q,"id":%q}`, service, id), nil
	case n == 1 && now != nil:
		w := *now
		w.override = 1 + rng.IntN(1000)
		return http.MethodPatch, "/services/" + name, fmt.Sprintf(`{"weight":%d}`, w.override), &w
	}
	w := wanted{addr: fmt.Sprint(alive, "/", rng.IntN(3)), weight: rng.IntN(1000), zone: fmt.Sprint(rng.IntN(5))}
	if now != nil {
		w.override = now.override
	}
	ttl := ""
	if rng.IntN(2) == 0 {
		w.ttl, ttl = "1h0m0s", `,"ttl":"1h"`
	}
	return http.MethodPost, "/register", fmt.Sprintf(`{"service":%q,"id":%q,"addr":%q,"weight":%d,"metadata":{"zone":%q}%s}`, service, id, w.addr, w.weight, w.zone, ttl), &w
}

// holdOnce registers held/a by a connection, and returns its generation.
func holdOnce(k *keeping) (generation uint64) {
	req, err := http.NewRequest(http.MethodPost, "http://"+k.admin+"/register?hold", strings.NewReader(`{"service":"held","id":"a","addr":"http://127.0.0.1:1"}`))
	if err != nil {
		k.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+dataToken)
	req.Header.Set("Content-Type", "application/json")
	response, err := k.client.Do(req)
	if err != nil {
		k.t.Fatal(err)
	}
	defer response.Body.Close()
	var line struct {
		Registered bool
		Generation uint64
	}
	if err := json.NewDecoder(response.Body).Decode(&line); err != nil || !line.Registered {
		k.t.Fatalf("%d, %+v, %v", response.StatusCode, line, err)
	}
	return line.Generation
}

// After a restart requests go to those that accept connections, and /services says what the others are.
func TestDataRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "here") }))
	defer ln.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	g := keep(t, dir)
	for id, addr := range map[string]string{"here": "http://" + ln.Addr().String(), "away": "http://" + closed.Addr().String()} {
		if status, text, err := g.call(http.MethodPost, "/register", fmt.Sprintf(`{"service":"echo","id":%q,"addr":%q,"ttl":"20s"}`, id, addr)); err != nil || status != http.StatusNoContent {
			t.Fatal(status, text, err)
		}
	}
	if g.logged("end with this process") {
		t.Error("the log says that registrations end with the process")
	}
	for _, end := range []func(){g.kill, func() { g.signal(syscall.SIGTERM); g.wait() }} {
		end()
		g = keep(t, dir)
		for range 10 {
			if status, body := g.get("/echo"); status != http.StatusOK || body != "here" {
				t.Errorf("%d %q", status, body)
			}
		}
		states := map[string]string{}
		for name, in := range g.services() {
			states[name] = in.State
		}
		if diff := cmp.Diff(map[string]string{"echo/here": "up", "echo/away": "unreachable"}, states); diff != "" {
			t.Error(diff)
		}
		if !g.logged("registrations restored", `"instances":2`, `"unreachable":1`) {
			t.Error("the log does not say so")
		}
	}
	if status, text, err := g.call(http.MethodGet, "/services/echo/away", ""); err != nil || status != http.StatusOK || !strings.Contains(text, `"ready":false,"reason":"unreachable"`) {
		t.Error(status, text, err)
	}
}

// A gateway whose file is damaged, or another's, ends with 1 and says which file; the file is as it was.
func TestBadData(t *testing.T) {
	good := filepath.Join(t.TempDir(), "good")
	g := keep(t, good)
	for i := range 100 {
		if status, text, err := g.call(http.MethodPost, "/register", fmt.Sprintf(`{"service":"echo","id":"%d","addr":"http://127.0.0.1:1"}`, i)); err != nil || status != http.StatusNoContent {
			t.Fatal(status, text, err)
		}
	}
	sum := func(path string) [sha256.Size]byte {
		t.Helper()
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return sha256.Sum256(data)
	}
	refused := func(dir string, words ...string) {
		t.Helper()
		path := filepath.Join(dir, "registry.db")
		before := sum(path)
		_, stderr, code := command(t, nil, "--listen=127.0.0.1:0", "--admin=127.0.0.1:0", "--data", dir)
		for _, word := range append(words, "--data", path) {
			if code != 1 || !strings.Contains(stderr, word) {
				t.Errorf("exit code %d, %q is not in %q", code, word, stderr)
			}
		}
		if sum(path) != before {
			t.Error("the file has changed")
		}
	}
	refused(good, "in use by another process", "another gateway")
	if status, text, err := g.call(http.MethodGet, "/services/echo/99", ""); err != nil || status != http.StatusOK {
		t.Error(status, text, err) // and the one that has it goes on
	}
	g.kill()
	data, err := os.ReadFile(filepath.Join(good, "registry.db"))
	if err != nil {
		t.Fatal(err)
	}
	flipped := strings.Replace(string(data), "http://127.0.0.1:1", "http://127.0.0.2:1", -1)
	for _, row := range []struct{ name, data string }{{"cut", string(data[:len(data)/4])}, {"empty", ""}, {"text", "no file of bbolt"}, {"flipped", flipped}} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "registry.db"), []byte(row.data), 0o600); err != nil {
			t.Fatal(err)
		}
		refused(dir, "is damaged", "move it away", "left as it is")
	}
}

// Instances that come and go, with all that the gateway does for them, leave nothing behind.
func TestRoundsLeaveNothing(t *testing.T) {
	rounds := 10_000
	if testing.Short() || raceDetector {
		rounds = 1000
	}
	const callers = 64
	k := keep(t, t.TempDir())
	alive := named(t, "a")
	play := func(rounds int) {
		var next atomic.Int64
		var playing sync.WaitGroup
		for range callers {
			playing.Go(func() {
				for n := next.Add(1); int(n) <= rounds; n = next.Add(1) {
					service, id := fmt.Sprint("s", n%50), fmt.Sprint(n)
					at := "/services/" + service + "/" + id
					for _, call := range [][3]string{
						{"PUT", at, fmt.Sprintf(`{"addr":%q,"ttl":"1h","check":{"tcp":true,"interval":"1s"},"slow_start":"1s"}`, alive)},
						{"POST", at + "/heartbeat", ""},
						{"PUT", at, fmt.Sprintf(`{"addr":%q,"ttl":"2h","check":{"path":"/","interval":"1s"}}`, alive)},
						{"DELETE", at, ""},
					} {
						if status, text, err := k.call(call[0], call[1], call[2]); err != nil || status != http.StatusNoContent {
							t.Errorf("%v: %d %s, %v", call, status, text, err)
							return
						}
					}
				}
			})
		}
		playing.Wait()
	}
	play(200) // what stays from the first on
	k.client.CloseIdleConnections()
	counts := func() (goroutines, files, left float64) {
		s := k.scrape()
		return s.value("go_goroutines"), s.value("process_open_fds"), s.value("kerberos_leases") + s.value("kerberos_instances") + s.value("kerberos_holds")
	}
	var goroutines, files, left float64
	eventually(t, "it is quiet", func() bool {
		before := goroutines + files
		goroutines, files, left = counts()
		return goroutines+files == before && left == 0
	})
	play(rounds)
	k.client.CloseIdleConnections()
	var goroutinesNow, filesNow float64
	eventually(t, fmt.Sprintf("what was there before: %.0f goroutines, %.0f files", goroutines, files), func() bool {
		goroutinesNow, filesNow, left = counts()
		return goroutinesNow <= goroutines && filesNow <= files && left == 0
	})
	if all := k.services(); len(all) > 0 {
		t.Errorf("left: %v", all)
	}
	t.Logf("%d rounds: %.0f goroutines before and %.0f behind, %.0f and %.0f files", rounds, goroutines, goroutinesNow, files, filesNow)
}
